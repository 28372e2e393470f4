"""The output of the command line beside its results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import qins

pytest.importorskip("typer")
from qins.cli.noise import noise, split_arguments

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("quantize a b", (False, False, "quantize a b")),
        ("-q quantize a b", (True, False, "quantize a b")),
        ("quantize a --quiet b", (True, False, "quantize a b")),
        ("quantize a b -v", (False, True, "quantize a b")),
        ("-v generate m -p x", (False, True, "generate m -p x")),
        ("generate m -v -q", (True, False, "generate m -v")),
        ("--verbose chat m --verbose", (False, True, "chat m --verbose")),
        ("inspect -- -q", (False, False, "inspect -- -q")),
        ("", (False, False, "")),
    ],
)
def test_options_before_and_after_the_command(line, expected):
    quiet, verbose, left = split_arguments(line.split())
    assert (quiet, verbose, " ".join(left)) == expected


@pytest.mark.parametrize(("quiet", "verbose"), [(False, False), (True, False), (False, True)])
def test_libraries_are_told(monkeypatch, quiet, verbose):
    for name in ("TRANSFORMERS_VERBOSITY", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    with noise(quiet, verbose):
        assert os.environ.get("TRANSFORMERS_VERBOSITY") == (None if verbose else "error")
        assert os.environ["TQDM_DISABLE"] == os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"  # no terminal here
    assert "TQDM_DISABLE" not in os.environ
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with noise(quiet, verbose):
        assert ("TQDM_DISABLE" in os.environ) == quiet


def run(*arguments):
    command = [sys.executable, "-m", "qins.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.long
def test_quiet_and_verbose(tmp_path):
    torch.save(nn.Sequential(nn.Linear(300, 20)).state_dict(), tmp_path / "a.pt")
    bench = ("bench", "--shape", "64x200", "--rows", "1", "--seconds", "0.01", "--group-size", "100")
    said = run(*bench)
    assert said.stderr.startswith("warning: group_size 100")
    silent = run(*bench, "-q")
    assert silent.returncode == 0
    assert silent.stderr == ""
    assert "64x200" in silent.stdout
    wrong = run("--quiet", "inspect", tmp_path / "b.pt")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")
    told = run("inspect", tmp_path / "a.pt", "-v")
    assert told.returncode == 0
    assert told.stderr.startswith("took ")
    assert told.stdout == run("inspect", tmp_path / "a.pt").stdout


def test_bars_are_ours_to_hide(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with noise(True, False):
        qins.convert(nn.Sequential(nn.Linear(64, 8)))
    assert capsys.readouterr().err == ""
