"""Scripts written for the seed's modules run unchanged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import long_but
from torch import nn

import qins
from qins import compat

pytestmark = pytest.mark.once

SCRIPTS = Path(__file__).parent / "seed_scripts"
STALE = "raise AssertionError('the stale module beside the script was imported')\n"


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2)])
def test_usage(capsys, arguments, code):
    with pytest.raises(SystemExit) as stopped:
        compat.scripts.main(arguments)
    assert stopped.value.code == code
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m qins.compat script.py [arguments]\n")
    assert compat.scripts.__doc__.strip() in said


@pytest.fixture
def beside(tmp_path):
    """A directory laid out as in the seed: scripts at the top, stale modules beside them and in src."""
    for script in SCRIPTS.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "src").mkdir()
    for name in ("qins_codec.py", "qins_weight_codec.py"):
        (tmp_path / name).write_text(STALE)
        (tmp_path / "src" / name).write_text(STALE)
    (tmp_path / "src" / "helpers.py").write_text("def banner(text):\n    return f'== {text}'\n")
    return tmp_path


def run(directory, *arguments, cwd=None, env=None):
    done = subprocess.run(
        [sys.executable, "-m", "qins.compat", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd or directory, env={**os.environ, **(env or {})},
    )  # fmt: skip
    print(done.stdout, done.stderr)
    return done


@pytest.mark.long
def test_greedy_toy(beside):
    done = run(beside, "greedy_toy.py", "500")
    assert done.returncode == 0
    assert "Greedy match: 100.00% (500/500 tokens)" in done.stdout
    assert "FP32 13.9" in done.stdout
    assert re.search(r"QINS 9\.\d+ MB, 1\.48x", done.stdout)
    report = qins.inspect(beside / "toy_qins.pt")
    assert len(report.layers) == 18
    assert not report.problems


@pytest.mark.parametrize("src", long_but(["namespace"], ["package", "namespace", "none"]))
def test_round_trip(beside, src):
    if src == "package":
        (beside / "src" / "__init__.py").write_text("")
    elif src == "none":
        shutil.rmtree(beside / "src")
    done = run(beside, beside / "round_trip.py", cwd=beside.parent)
    assert done.returncode == 0
    assert "ALL PASSED" in done.stdout


@pytest.mark.long
def test_memory(beside):
    done = run(beside, "memory.py")
    assert done.returncode == 0
    assert "== 2.00x on encoded weights" in done.stdout


@pytest.mark.long
def test_phi35_pattern_a(beside, phi35_hub):
    done = run(beside, "pattern_a_phi35.py", env=phi35_hub)
    assert done.returncode == 0
    layers, tokens = re.search(r"layers (\d+), tokens (\d+)/15", done.stdout).groups()
    assert int(layers) == 90
    assert int(tokens) >= 10  # correct models may diverge; measured: 15
    before, after = map(float, re.search(r"([\d.]+) -> ([\d.]+) MB", done.stdout).groups())
    assert after < 0.55 * before


@pytest.mark.long
def test_arguments_and_errors(beside):
    (beside / "echo.py").write_text(
        "import sys, src\nprint(sys.argv[1:], __name__, __file__)\nimport qins_codec\nprint(qins_codec.__doc__)\n"
        "if len(sys.argv) > 2: raise SystemExit(7)\n"
    )
    done = run(beside, "echo.py", "--x=1")
    assert done.returncode == 0
    assert "['--x=1'] __main__" in done.stdout
    assert "qins.compat" in done.stdout
    assert run(beside, "echo.py", "a", "b").returncode == 7
    assert "no such file" in run(beside, "missing.py").stderr
    assert run(beside).returncode == 2
    assert "usage" in run(beside, "--help").stdout


def test_a_pickled_model_is_found_again(beside):
    (beside / "save.py").write_text(
        "import torch, torch.nn as nn\nfrom src.qins_codec import QINSLinear\n"
        "torch.save(nn.Sequential(QINSLinear.from_linear(nn.Linear(4, 4))), 'whole.pt')\n"
        "assert torch.load('whole.pt', weights_only=False)[0].stored.shape == (4, 4)\n"
    )
    assert run(beside, "save.py").returncode == 0
    assert type(torch.load(beside / "whole.pt", weights_only=False)[0]) is compat.QINSLinear


def test_layer():
    torch.manual_seed(0)
    linear = nn.Linear(30, 20)
    layer = compat.QINSLinear.from_linear(linear)
    assert not isinstance(layer, nn.Linear)
    assert set(layer.state_dict()) == {"stored", "sign", "log_min", "log_max", "bias"}
    same = qins.QINSLinear.from_linear(linear, "golden")
    x = torch.randn(3, 30)
    assert torch.equal(layer(x), same(x))
    assert torch.equal(layer.weight, same.weight)
    same.load_state_dict(layer.state_dict())
    layer.clear_cache()
    before = layer.log_min.clone()
    assert torch.equal(layer.half().log_min, before)
    assert layer.bias.dtype == torch.float16
    assert "in_features=30" in repr(layer)
    with pytest.raises(TypeError, match=r"nn\.Linear"):
        compat.QINSLinear.from_linear(nn.Embedding(2, 2))
    empty = compat.QINSLinear(5, 3, bias=False)
    assert empty.bias is None
    assert torch.isfinite(empty(torch.ones(2, 5))).all()
