"""`qins quantize --calibrate`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qins

transformers = pytest.importorskip("transformers")
from tokens import save_calibrated_source  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture
def source(tmp_path):
    return save_calibrated_source(tmp_path / "float")


@pytest.mark.long
def test_command_line(source, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "qins.cli", "quantize", str(source), str(tmp_path / "out"), "--calibrate",
         str(tmp_path / "text.txt"), "--calibration-tokens", "512"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert qins.load(tmp_path / "out").config.quantization_config.calibration["tokens"] == 448
    short = tmp_path / "short.txt"
    short.write_text("w5 w6")
    run = subprocess.run(
        [sys.executable, "-m", "qins.cli", "quantize", str(source), str(tmp_path / "no"), "--calibrate", str(short)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1
    assert "expected at least 256 tokens" in run.stderr
    assert not (tmp_path / "no").exists()
