"""Imports, the choice of instruction set and threads, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qins

ROOT = Path(__file__).parent.parent


def python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.once
@pytest.mark.parametrize("other", ["sys.byteorder = 'big'", "sys.maxsize = 2**31 - 1"])
def test_other_machines_are_refused_at_build_time(other):
    setup = ROOT / "setup.py"
    run = "sys.argv = [setup, 'build_ext', '--dry-run']; runpy.run_path(setup, run_name='__main__')"
    done = python(f"import runpy, sys, numpy, setuptools; setup = {str(setup)!r}; {other}; {run}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("qins needs a 64-bit little-endian Python")


def test_import_is_light():
    run = python("import sys, qins; assert 'torch' not in sys.modules and 'rich' not in sys.modules; dir(qins)")
    assert run.returncode == 0, run.stderr


def test_public_names():
    for name in qins.__all__:
        assert hasattr(qins, name)
        assert name in dir(qins)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qins.nonsense


@pytest.mark.parametrize("name", qins.isas())
def test_isa_from_environment(name):
    run = python("import qins; print(qins.isa())", QINS_ISA=name)
    assert run.stdout.split() == [name]


@pytest.mark.parametrize("name", ["sse9", "neon" if "neon" not in qins.isas() else "avx512", "Scalar"])
def test_unknown_isa(name):
    run = python("import qins", QINS_ISA=name)
    assert run.returncode != 0
    assert "QINS_ISA" in run.stderr
    assert "'scalar'" in run.stderr
    with pytest.raises(ValueError, match=r"isa: expected one of .*'scalar'.*got"):
        qins.use_isa(name)


def test_use_isa_restores():
    before = qins.isa()
    with pytest.raises(RuntimeError, match="inside"), qins.use_isa("scalar"):
        assert qins.isa() == "scalar"
        raise RuntimeError("inside")
    assert qins.isa() == before
    qins.use_isa("scalar")  # without a block it stays
    assert qins.isa() == "scalar"
    qins.use_isa(before)


@pytest.mark.once
def test_threads():
    program = "import qins; print(qins.get_num_threads())"
    assert python(program, OMP_NUM_THREADS="3").stdout.split() == ["3"]
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + program
    assert python(one, OMP_NUM_THREADS="").stdout.split() == ["1"]
    qins.set_num_threads(5)
    assert qins.get_num_threads() == 5
    for bad in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="n: expected a positive integer"):
            qins.set_num_threads(bad)


def test_follows_torch():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert qins.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.once
def test_after_fork():
    program = """
import os, sys, numpy as np, qins
if sys.argv[1:]: import torch, qins.codec.tensors; torch.randn(500, 500) @ torch.randn(500, 500)
w = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
qins.set_num_threads(2)
expected = qins.encode(w).decode()
pid = os.fork()
if pid == 0:
    os._exit(0 if np.array_equal(qins.encode(w).decode(), expected) else 1)
assert os.waitpid(pid, 0)[1] == 0
assert np.array_equal(qins.encode(w).decode(), expected)
"""
    for arguments in ([], ["torch"]):
        run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr


def test_nonfinite_message_is_exact():
    with pytest.raises(ValueError, match="got 1 NaN or infinite, the first at flat index 1"):
        qins.encode(np.array([0.0, np.nan], np.float32))


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "qins.cli", *arguments],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.once
def test_help():
    run = command("--help")
    assert run.returncode == 0
    assert "demo" in run.stdout
    assert "model" in command("demo", "--help").stdout


@pytest.mark.long
@pytest.mark.once
def test_user_errors_are_one_line(tmp_path):
    run = command("demo", "--model", str(tmp_path / "nothing"), HF_HUB_OFFLINE="1")
    assert run.returncode == 1
    assert "error:" in run.stderr
    assert "Traceback" not in run.stderr
    run = command("demo", "--codec", "int3")
    assert run.returncode == 1
    assert "codec: expected one of" in run.stderr


@pytest.mark.long
@pytest.mark.once
def test_demo(tmp_path):
    picture = tmp_path / "picture.png"
    run = command("demo", "--tokens", "64", "--json", "--picture", str(picture))
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert result["snr_db"] > 44
    assert result["fidelity"]["tokens"] == 63
    assert sum(result["bytes_after"].values()) < sum(result["bytes_before"].values()) / 2
    assert set(result["answers"]) == {"float32", "log8"}
    assert "Paris" in result["answers"]["log8"]
    assert min(result["tokens_per_second"].values()) > 0


@pytest.mark.long
@pytest.mark.once
def test_bench():
    run = command("bench", "--shape", "64x96", "--rows", "1", "--rows", "20", "--seconds", "0.01", "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["shape"] == [64, 96]
    assert set(result["milliseconds"]) == {"1", "20"}
    assert all(t > 0 for times in result["milliseconds"].values() for t in times.values())
    wrong = command("bench", "--shape", "64")
    assert wrong.returncode == 1
    assert "shape: expected OUTxIN" in wrong.stderr


@pytest.mark.long
@pytest.mark.once
def test_names_are_not_shadowed_by_modules():
    """Importing any submodule must not replace a public function of the package."""
    run = python(
        "import importlib, pkgutil, qins\n"
        "for m in pkgutil.iter_modules(qins.__path__):\n"
        "    importlib.import_module('qins.' + m.name)\n"
        "import types\n"
        "modules = [n for n in qins.__all__ if isinstance(getattr(qins, n), types.ModuleType)]\n"
        "assert modules == ['rational'], modules"
    )
    assert run.returncode == 0, run.stderr
