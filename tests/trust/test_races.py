"""The short form of races.py, and a second interpreter; `make trust-races` runs the long one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.once


def run(*command):
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)


@pytest.mark.long
def test_threads_that_share_everything():
    with_torch = ["--torch"] if importlib.util.find_spec("torch") else []
    done = run(HERE / "stress.py", "--seconds", "3", *with_torch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'fork'" in done.stdout


@pytest.mark.long
def test_threads_under_thread_sanitizer():
    if shutil.which("gcc") is None or not Path(libtsan()).is_file():
        pytest.skip("NOT RUN: races need gcc and libtsan")
    done = run(HERE / "races.py", "--brief")
    assert done.returncode == 0, done.stdout + done.stderr


def libtsan():
    told = subprocess.run(["gcc", "-print-file-name=libtsan.so"], capture_output=True, text=True)
    return told.stdout.strip()


def test_a_second_interpreter_is_refused():
    """With an ImportError, and the first one goes on: NumPy's C API is bound to the main interpreter.

    Before Python 3.12, where modules have no say in this, NumPy's own import refuses.
    """
    lines = """
import sys, numpy, qins
try:
    import _interpreters as interpreters  # Python 3.13
except ImportError:
    import _xxsubinterpreters as interpreters
run = getattr(interpreters, "exec", None) or interpreters.run_string
second = interpreters.create()
error = run(second, f'''
import sys
sys.path[:] = {sys.path}
try:
    import qins._core
except ImportError as e:
    print(e, flush=True)
else:
    raise SystemExit("imported")
''')
assert not error, error
interpreters.destroy(second)
w = numpy.ones((8, 64), numpy.float32)
assert numpy.abs(qins.encode(w).decode() - w).max() < 0.01
print("the first goes on")
"""
    done = run("-W", "ignore", "-c", lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the first goes on\n")
    assert any(told in done.stdout for told in ("more than once per process", "in subinterpreters")), done.stdout
