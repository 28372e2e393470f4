"""qins quantize --ray: the same bytes as from one process, whatever happens to workers, machines and the driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make
from tiny_experts import make as moe
from tokens import save_calibrated_source
from tokens import text as words

import qins
from qins.checkpoint import Destination, quantize_checkpoint
from qins.files import ShardWriter
from qins.hf import Calibration

ray = pytest.importorskip("ray", reason="needs Ray: make test-ray")

from qins.cluster import converting, quantize_on_ray, rounding  # noqa: E402

pytestmark = pytest.mark.once

OPTIONS = {"log4": {"codec": "log4"}, "embeddings": {"lm_head": True, "embeddings": True}}


def tree(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def slowly(monkeypatch, log, seconds=1.0):
    """Make each shard wait this long before its file is closed; note which process of which node it is."""
    original = converting.convert

    def convert(job, file):
        begun = log / f"{file.name} {os.getpid()} {time.time_ns()}"
        close = ShardWriter.close

        def later(self):
            begun.write_text(ray.get_runtime_context().get_node_id())
            time.sleep(seconds)
            close(self)

        ShardWriter.close = later
        try:
            made = original(job, file)
        finally:
            ShardWriter.close = close
        begun.with_name(begun.name + " done").touch()
        return made

    log.mkdir(exist_ok=True)
    monkeypatch.setattr(converting, "convert", convert)


def begun(log):
    return [p for p in log.iterdir() if not p.name.endswith(" done")]


def attempts(log):
    """Return the number of attempts at each shard."""
    names = [p.name.split()[0] for p in begun(log)]
    return {n: names.count(n) for n in names}


@pytest.mark.parametrize("kind", ["log8", "log4", "embeddings", "exact", "experts", "torch files", "one file"])
def test_same_bytes(connected, source, tmp_path, kind):
    exact = kind == "exact"
    if kind == "experts":
        moe("mixtral").save_pretrained(tmp_path / "other", max_shard_size="40KB")
        source = tmp_path / "other"
    elif kind == "one file":
        make("llama").save_pretrained(tmp_path / "other")
        source = tmp_path / "other"
    elif kind == "torch files":
        state, weight_map = make("llama").state_dict(), {}
        for i, names in enumerate([[*state][:9], [*state][9:]]):
            torch.save({n: state[n] for n in names}, source / f"pytorch_model-{i}.bin")
            weight_map |= dict.fromkeys(names, f"pytorch_model-{i}.bin")
        for path in (*source.glob("*.safetensors"), source / "model.safetensors.index.json"):
            path.unlink()
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    options = OPTIONS.get(kind, {})
    expected = quantize_checkpoint(source, tmp_path / "one", qins.QinsConfig(**options), exact=exact)
    result = quantize_on_ray(source, tmp_path / "ray", qins.QinsConfig(**options), exact=exact)
    cost = result.pop("cost")
    assert result == expected
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")
    assert cost["attempts"] == len(result["files"])
    assert cost["bytes_read"] == result["bytes_before"]
    assert cost["bytes_written"] >= result["bytes_after"]
    assert 1 <= cost["workers"] <= cost["attempts"]
    assert cost["cpu_seconds"] > 0
    assert not qins.inspect(tmp_path / "ray").problems


@pytest.mark.parametrize("target", [None, 6.5])
def test_same_bytes_calibrated(connected, tmp_path, monkeypatch, target):
    """A task per layer chooses its codes; one is killed, and starts again."""
    source, killed, original = tmp_path / "float", tmp_path / "killed", rounding.choose
    save_calibrated_source(source)
    calibration = Calibration(words(2000), 1024, target)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def choose(*arguments):
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    monkeypatch.setattr(rounding, "choose", choose)
    try:
        quantize_checkpoint(source, tmp_path / "one", calibration=calibration)
        assert not killed.exists()
        quantize_on_ray(source, tmp_path / "ray", calibration=calibration)
    finally:
        torch.set_num_threads(threads)
    assert killed.exists()
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")


def test_a_layer_that_cannot_be_calibrated(connected, tmp_path):
    """The error is that of one process."""
    source = tmp_path / "float"
    save_calibrated_source(source)
    shard = next(p for p in sorted(source.glob("*.safetensors")) if any("q_proj" in k for k in load_file(p)))
    state = load_file(shard)
    name = next(k for k in state if "q_proj" in k)
    state[name][0, 0] = float("inf")
    save_file(state, shard, {"format": "pt"})
    told = []
    for function, out in ((quantize_checkpoint, "one"), (quantize_on_ray, "ray")):
        with pytest.raises(ValueError, match="q_proj") as error:
            function(source, tmp_path / out, calibration=Calibration(words(2000), 1024))
        told.append(str(error.value))
    assert told[0] == told[1]


def test_a_worker_is_killed(connected, source, tmp_path, monkeypatch):
    quantize_checkpoint(source, tmp_path / "one")
    log = tmp_path / "log"
    slowly(monkeypatch, log)
    killed = []

    def kill():
        while len(killed) < 3:
            time.sleep(0.5)
            for path in begun(log):
                if not path.with_name(path.name + " done").exists() and path.name not in killed and len(killed) < 3:
                    with suppress(ProcessLookupError):
                        os.kill(int(path.name.split()[1]), signal.SIGKILL)
                        killed.append(path.name)
                    break

    thread = threading.Thread(target=kill)
    thread.start()
    result = quantize_on_ray(source, tmp_path / "ray")
    thread.join()
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")
    assert len(begun(log)) == len(result["files"]) + len(killed)  # only what was killed is done again
    assert max(attempts(log).values()) > 1


def test_a_node_is_removed(connected, source, tmp_path, monkeypatch):
    quantize_checkpoint(source, tmp_path / "one")
    log = tmp_path / "log"
    slowly(monkeypatch, log)
    node = connected.add_node(num_cpus=2, memory=6 << 30)
    done = threading.Event()

    def remove():
        while not any(p.read_text() == node.node_id for p in begun(log)):
            time.sleep(0.1)
        time.sleep(0.3)
        connected.remove_node(node, allow_graceful=False)
        done.set()

    thread = threading.Thread(target=remove)
    thread.start()
    result = quantize_on_ray(source, tmp_path / "ray")
    thread.join()
    assert done.is_set()
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")
    lost = [p for p in begun(log) if not p.with_name(p.name + " done").exists()]
    assert lost
    assert {p.read_text() for p in lost} == {node.node_id}
    assert len(begun(log)) - len(lost) == len(result["files"])


_DRIVER = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import pytest, test_quantizing as t
patch = pytest.MonkeyPatch()
t.slowly(patch, Path(sys.argv[4]), 0.3)
t.quantize_on_ray(sys.argv[2], sys.argv[3], address=sys.argv[5])
"""


def drive(source, out, log, address):
    command = [sys.executable, "-c", _DRIVER, str(Path(__file__).parent), str(source), str(out), str(log), address]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def test_the_driver_is_restarted(cluster, source, tmp_path):
    """What was committed is neither converted nor written again."""
    quantize_checkpoint(source, tmp_path / "one")
    expected, out, log = tree(tmp_path / "one"), tmp_path / "ray", tmp_path / "log"
    total = len(list(source.glob("*.safetensors")))
    with drive(source, out, log, cluster.address) as driver:
        while len(list(out.glob("model-*.safetensors"))) < total // 3:
            assert driver.poll() is None, driver.stderr.read().decode()
            time.sleep(0.02)
        driver.kill()
    committed = {p.name: p.stat().st_mtime_ns for p in out.glob("model-*.safetensors")}
    assert total // 3 <= len(committed) < total
    assert all((out / n).read_bytes() == expected[n] for n in committed)
    assert not (out / "config.json").exists()
    again = tmp_path / "again"
    with drive(source, out, again, cluster.address) as driver:
        told = driver.communicate()[1]
        assert driver.returncode == 0, told.decode()
    assert tree(out) == expected
    assert {n: (out / n).stat().st_mtime_ns for n in committed} == committed
    assert not {*attempts(again)} & {*committed}
    assert len(attempts(again)) == total - len(committed)


@pytest.mark.parametrize("first", ["cluster", "process"])
def test_one_resumes_what_the_other_began(connected, source, tmp_path, monkeypatch, first):
    quantize_checkpoint(source, tmp_path / "one")
    expected, out = tree(tmp_path / "one"), tmp_path / "out"
    method = {"cluster": "commit", "process": "put"}[first]
    original = getattr(Destination, method)

    def interrupted(self, *args):
        if len(list(out.glob("model-*.safetensors"))) >= 3:
            raise KeyboardInterrupt
        return original(self, *args)

    functions = [quantize_on_ray, quantize_checkpoint]
    begin, resume = functions if first == "cluster" else functions[::-1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Destination, method, interrupted)
        begin(source, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("model-*.safetensors")}
    assert len(before) == 3
    resume(source, out)
    assert tree(out) == expected
    assert {n: (out / n).stat().st_mtime_ns for n in before} == before


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_object_store(connected, store, source, tmp_path, seconds):
    """Requests that fail in three ways, and slow ones, from all workers."""
    quantize_checkpoint(source, tmp_path / "one", exact=True)
    system, name = store.filesystem(), f"float{seconds}"
    system.put(f"{source}/", f"bucket/{name}/", recursive=True)
    store.every, store.delay, before = 7, seconds, store.failed
    try:
        quantize_on_ray(f"s3://bucket/{name}", f"s3://bucket/out{seconds}", exact=True)
    finally:
        store.every, store.delay = 0, 0.0
    assert store.failed - before > 10
    assert objects(store, f"bucket/out{seconds}") == tree(tmp_path / "one")


def objects(store, path):
    system = store.filesystem()
    return {n.rpartition("/")[2]: system.cat_file(n) for n in system.ls(path, detail=False)}


def test_object_store_with_losses(connected, store, source, tmp_path, monkeypatch):
    """A worker is killed, and the driver is restarted: objects that were there are not written again."""
    quantize_checkpoint(source, tmp_path / "one")
    system = store.filesystem()
    system.put(f"{source}/", "bucket/lost/", recursive=True)
    log, out = tmp_path / "log", "s3://bucket/lost-out"
    total = len(list(source.glob("*.safetensors")))
    with drive("s3://bucket/lost", out, log, connected.address) as driver:
        killed = False
        while True:
            assert driver.poll() is None, driver.stderr.read().decode()
            if not killed and log.exists() and begun(log):
                os.kill(int(begun(log)[0].name.split()[1]), signal.SIGKILL)
                killed = True
            system.invalidate_cache()
            if system.exists("bucket/lost-out") and len(system.glob("bucket/lost-out/model-*")) >= total // 3:
                break
            time.sleep(0.1)
        driver.kill()
    time.sleep(2)  # a worker of the killed driver may still write
    system.invalidate_cache()
    before = {n: system.info(n)["LastModified"] for n in system.glob("bucket/lost-out/model-*.safetensors")}
    again = tmp_path / "again"
    slowly(monkeypatch, again, 0.0)
    quantize_on_ray("s3://bucket/lost", out)
    assert objects(store, "bucket/lost-out") == tree(tmp_path / "one")
    system.invalidate_cache()
    assert {n: system.info(n)["LastModified"] for n in before} == before
    assert not {*attempts(again)} & {n.rpartition("/")[2] for n in before}


def test_a_fault_in_a_shard(connected, source, tmp_path):
    """The error is that of one process."""
    found = ((p, k) for p in sorted(source.glob("*.safetensors")) for k in load_file(p) if "down_proj" in k)
    shard, key = list(found)[-1]
    state = load_file(shard)
    state[key][1, 1] = float("nan")
    save_file(state, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{shard.name}: {key}: ") as error:
        quantize_on_ray(source, tmp_path / "ray")
    assert type(error.value) is ValueError
    assert "Traceback" not in str(error.value)
    names = tree_names(tmp_path / "ray")
    assert "config.json" not in names
    assert shard.name not in names


def tree_names(path):
    return [p.name for p in path.iterdir() if p.is_file()]


def test_what_cannot_run(connected, source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match=r"weight: needs [\d,]+ bytes of memory, "):
        patch.setattr(converting, "_BASE", 1 << 50)
        quantize_on_ray(source, tmp_path / "a")
    original = converting.Job
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match=r"has qins .*, the driver has 0.0"),
    ):
        patch.setattr(converting, "Job", lambda *args: original(*args, version="0.0"))
        quantize_on_ray(source, tmp_path / "b")

    def elsewhere(name, conversion, destination, tally):
        return original(name, conversion, type(destination)(tmp_path / "nowhere"), tally)

    with (
        monkeypatch.context() as patch,
        pytest.raises(FileNotFoundError, match=r"nowhere: not there on .*: with several"),
    ):
        patch.setattr(converting, "Job", elsewhere)
        quantize_on_ray(source, tmp_path / "c")


def test_dashboard(connected, source, tmp_path):
    """The names of tasks, and the metrics."""
    from ray.util.state import list_tasks

    result = quantize_on_ray(source, tmp_path / "ray")
    expected = {f"qins quantize {name}" for name in result["files"]}
    addresses = [
        f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in ray.nodes() if n["Alive"]
    ]
    names, metrics = set(), ""
    for _ in range(60):  # both arrive after seconds
        names |= {t.name for t in list_tasks(limit=1000, detail=False)}
        for address in addresses:
            with suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
                metrics += answer.read().decode()
        if expected <= names and "qins_source_bytes" in metrics and "qins_cpu_seconds" in metrics:
            return
        time.sleep(0.5)
    raise AssertionError((names, "qins_source_bytes" in metrics))


def test_one_bar(connected, source, tmp_path, monkeypatch):
    """Its steps add up to the source's bytes, whatever order workers tell them in."""
    log = tmp_path / "log"
    slowly(monkeypatch, log, 0.4)
    steps = []

    class Bar(converting._Bar):
        def __init__(self, tally, advance):
            super().__init__(tally, lambda n, told=None: steps.append((n, told)))

    monkeypatch.setattr(converting, "_Bar", Bar)
    result = quantize_on_ray(source, tmp_path / "ray")
    assert sum(n for n, _ in steps) == result["bytes_before"]
    assert len([n for n, _ in steps if n]) > 2
    assert steps[-1][1].startswith("encoding: ")
    assert f"{result['cost']['workers']} workers" in steps[-1][1]


def test_command_line(cluster, source, tmp_path):
    quantize_checkpoint(source, tmp_path / "one")
    command = [sys.executable, "-m", "qins.cli", "quantize", str(source), str(tmp_path / "ray")]
    done = subprocess.run([*command, "--ray", cluster.address], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CPU seconds" in done.stdout
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")
    done = subprocess.run([*command, "--ray", "127.0.0.1:1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: 127.0.0.1:1: no Ray cluster there: " in done.stderr
    assert "Traceback" not in done.stderr
