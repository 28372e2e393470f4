"""`qins quantize --target-bits`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import qins

transformers = pytest.importorskip("transformers")
from tokens import save_tokenizer, sharp_llama  # noqa: E402
from tokens import text as words  # noqa: E402

pytestmark = pytest.mark.once


@pytest.mark.long
@pytest.mark.parametrize(("target", "least"), [(8.65, 8.0), (5.2, 4.5)])
def test_command_line(tmp_path, target, least):
    sharp_llama().save_pretrained(tmp_path / "float")
    save_tokenizer(tmp_path / "float")
    (tmp_path / "text.txt").write_text(words(2048))
    command = [sys.executable, "-m", "qins.cli", "quantize", str(tmp_path / "float"), str(tmp_path / "out")]
    bits = ["--target-bits", str(target)]
    if target > 8:
        run = subprocess.run([*command, *bits], capture_output=True, text=True)
        assert run.returncode == 1
        assert "expected --calibrate TEXT with them" in run.stderr
    run = subprocess.run([*command, *bits, "--calibrate", str(tmp_path / "text.txt")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "bits per weight, estimated mean KL divergence" in run.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["calibration"]["target_bits"] == target
    assert least < config["calibration"]["bits"] <= target
    loaded = qins.load(tmp_path / "out")
    layers = [m for m in loaded.modules() if isinstance(m, qins.QINSLinear)]
    assert len({(m.codec, m.group_size) for m in layers}) > 1
    assert all((m.codec == "log8") == (target > 8) for m in layers if m.codec in ("log4", "log8"))
    weights = sum(m.in_features * m.out_features for m in layers)
    assert 8 * sum(m.encoded.nbytes for m in layers) / weights == pytest.approx(config["calibration"]["bits"])
