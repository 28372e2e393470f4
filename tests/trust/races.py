"""stress.py under ThreadSanitizer: builds the extension with it, and fails on any report.

    python tests/trust/races.py [--brief] [--python INTERPRETER] [--seconds N]

INTERPRETER may be a free-threaded CPython, built with ThreadSanitizer or not; it needs NumPy. --brief leaves the
kernels uninstrumented, which touch only memory that their callers hand them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAST = ("-O1", "-DONE_BODY=1")  # fast to compile: see tests/core/build.sh
SANITIZE = ("-fsanitize=thread", "-g1")
ASK = """
import json, numpy, sysconfig
v = sysconfig.get_config_vars()
print(json.dumps({
    "include": [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), numpy.get_include()],
    "suffix": v["EXT_SUFFIX"], "sanitized": "--with-thread-sanitizer" in v.get("CONFIG_ARGS", ""), "cc": v["CC"],
}))
"""


def plain(command: list[str]) -> list[str]:
    """Return the command without address space randomization, some forms of which ThreadSanitizer cannot bear."""
    return ["setarch", "-R", *command] if shutil.which("setarch") else command


def ask(python: str) -> dict[str, object]:
    """Return what a build for this interpreter needs to know."""
    environment = os.environ | {"TSAN_OPTIONS": "report_bugs=0"}
    told = subprocess.run(plain([python, "-c", ASK]), check=True, capture_output=True, text=True, env=environment)
    return json.loads(told.stdout)


def build(compiler: str, about: dict[str, object], brief: bool, work: Path) -> None:
    """Build the package with an instrumented extension in `work`."""
    shutil.copytree(ROOT / "python", work / "python", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (work / "objects").mkdir()
    includes = [f"-I{path}" for path in (*about["include"], ROOT / "qins_ext")]

    def compile_one(source: Path) -> Path:
        target = work / "objects" / f"{source.stem}.o"
        flags = [*FAST, *SANITIZE]
        if source.name.startswith("isa_"):
            flags = list(FAST) if brief else ["-O0", *flags[1:]] if source.name == "isa_scalar.c" else flags
        subprocess.run(
            [compiler, "-std=c11", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", *flags, *includes, "-c", source,
             "-o", target], check=True,
        )  # fmt: skip
        return target

    sources = sorted((ROOT / "qins_ext").glob("*.c"), key=lambda p: not p.name.startswith("isa_"))  # the longest first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    extension = work / "python" / "qins" / f"_core{about['suffix']}"
    subprocess.run([compiler, "-shared", *SANITIZE[:1], *objects, "-o", extension, "-pthread", "-lm"], check=True)


def main() -> int:
    """Build, run and judge; return 1 on a report or a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brief", action="store_true", help="instrument no kernels, and run for seconds")
    parser.add_argument("--python", default=sys.executable, help="the interpreter; default: this one")
    parser.add_argument("--seconds", type=float, help="of each of the two phases; default: 60, with --brief 5")
    arguments = parser.parse_args()
    about = ask(arguments.python)
    # an instrumented interpreter brings the sanitizer's library, so the extension must be built by the same compiler
    compiler = str(about["cc"]).split()[0] if about["sanitized"] else "gcc"
    environment = os.environ | {
        # forked children start threads again
        "TSAN_OPTIONS": f"die_after_fork=0:exitcode=66:suppressions={ROOT / 'tests' / 'trust' / 'tsan.supp'}",
        "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHON_GIL": "0",
    }  # fmt: skip
    if not about["sanitized"]:
        library = subprocess.run([compiler, "-print-file-name=libtsan.so"], check=True, capture_output=True, text=True)
        environment["LD_PRELOAD"] = str(Path(library.stdout.strip()).resolve())
    seconds = arguments.seconds or (5 if arguments.brief else 60)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        build(compiler, about, arguments.brief, work)
        environment["PYTHONPATH"] = os.pathsep.join([str(work / "python"), os.environ.get("PYTHONPATH", "")])
        stress = [arguments.python, str(ROOT / "tests" / "trust" / "stress.py"), "--seconds", str(seconds)]
        done = subprocess.run(plain(stress), env=environment, capture_output=True, text=True)
    print(done.stdout + done.stderr, end="")
    reports = done.stderr.count("WARNING: ThreadSanitizer")
    print(f"ThreadSanitizer: {reports} reports")
    right = done.returncode == 0 and reports == 0 and "GIL: " in done.stdout
    print("1 passed, 0 failed" if right else "0 passed, 1 failed")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
