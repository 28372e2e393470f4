"""Calibration of checkpoints: the same codes as while loading, and resumption after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import qins
from qins.checkpoint import quantize_checkpoint
from qins.hf import Calibration, tokenized

transformers = pytest.importorskip("transformers")
from tiny import outputs, same_state  # noqa: E402
from tiny_experts import V5  # noqa: E402
from tiny_experts import make as moe  # noqa: E402
from tokens import save_calibrated_source, save_tokenizer  # noqa: E402
from tokens import text as words  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture
def source(tmp_path):
    return save_calibrated_source(tmp_path / "float")


def test_from_pretrained_and_quantize_agree(source, tmp_path):
    text = tmp_path / "text.txt"
    overrides = {"*o_proj": {"codec": "log9"}, "*up_proj": {"codec": "log4"}}
    config = qins.QinsConfig(calibration=str(text), calibration_tokens=1024, overrides=overrides)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    layer = loaded.model.layers[0].self_attn
    assert isinstance(layer.q_proj, qins.QINSLinear)
    assert layer.o_proj.codec == "log9"
    assert loaded.model.layers[0].mlp.up_proj.codec == "log4"
    nearest = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=qins.QinsConfig())
    assert not torch.equal(layer.q_proj.codes, nearest.model.layers[0].self_attn.q_proj.codes)
    loaded.save_pretrained(tmp_path / "saved")

    config = qins.QinsConfig(overrides=overrides)
    quantize_checkpoint(source, tmp_path / "out", config, calibration=Calibration(text.read_text(), 1024))
    assert not (tmp_path / "out" / "qins-calibration").exists()
    told = [json.loads((tmp_path / d / "config.json").read_text())["quantization_config"] for d in ("out", "saved")]
    assert told[0]["calibration"] == told[1]["calibration"]
    assert told[0]["calibration"]["tokens"] == 896
    for d in ("out", "saved"):
        again = qins.load(tmp_path / d)
        assert same_state(again, loaded)
        assert torch.equal(outputs(again), outputs(loaded))


@pytest.mark.parametrize("codec", ["log6", "log5", "log4"])
def test_packed_codes(source, tmp_path, codec):
    """Files are calibrated like models in memory; the result is closer to the original than with the nearest codes."""
    text = tmp_path / "text.txt"
    quantize_checkpoint(
        source, tmp_path / "out", qins.QinsConfig(codec), calibration=Calibration(text.read_text(), 1024)
    )
    got = qins.load(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    report = qins.calibrate(model, tokenized(source, text.read_text(), 1024), codec=codec)
    assert {m.codec for m in report.converted} == {codec}
    assert same_state(got, model)
    assert sum(m.error for m in report.converted) < 0.9 * sum(m.nearest_error for m in report.converted)


@pytest.mark.skipif(not V5, reason="transformers 4 has experts as linear layers")
def test_experts_get_the_nearest_codes(tmp_path):
    source, text = tmp_path / "float", tmp_path / "text.txt"
    moe("mixtral").save_pretrained(source)
    save_tokenizer(source)
    text.write_text(words(2048))
    config = qins.QinsConfig(calibration=str(text), calibration_tokens=1024, lm_head=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    config = qins.QinsConfig(lm_head=True)
    nearest = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    for got, other in zip(loaded.model.layers, nearest.model.layers, strict=True):
        assert same_state(got.mlp.experts, other.mlp.experts)
        assert not torch.equal(got.self_attn.q_proj.codes, other.self_attn.q_proj.codes)
    quantize_checkpoint(
        source, tmp_path / "out", qins.QinsConfig(lm_head=True), calibration=Calibration(text.read_text(), 1024)
    )
    assert same_state(qins.load(tmp_path / "out"), loaded)
    # in place
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    report = qins.calibrate(model, tokenized(source, text.read_text(), 1024), exclude=["*.gate"])
    assert same_state(model, loaded)
    assert sum("experts" in m.name for m in report.converted) == 4


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_killed_and_resumed(source, tmp_path):
    script = (
        "import sys, qins, qins.checkpoint.quantizing as c\n"
        "c.quantize_checkpoint(*sys.argv[1:3], qins.QinsConfig(), calibration=c.Calibration(open(sys.argv[3]).read()))"
    )

    def start(out):
        command = [sys.executable, "-c", script, str(source), str(out), str(tmp_path / "text.txt")]
        return subprocess.Popen(command)

    assert start(tmp_path / "whole").wait() == 0
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    out, kills, seen = tmp_path / "out", 0, set()
    for after in range(1, 4):  # after so many layers
        run = start(out)
        while run.poll() is None:
            done = {p.name for p in (out / "qins-calibration").glob("*.safetensors")}
            if len(done) >= 2 * after:
                break
            time.sleep(0.02)
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            kills += 1
        run.wait()
        assert done >= seen or not (out / "qins-calibration").exists()
        seen = done
    assert kills > 0
    # a run that was not killed in time has finished, and a finished one cannot be started again
    assert (start(out).wait() == 0) == (kills == 3)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == expected
