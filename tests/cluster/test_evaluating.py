"""qins eval --ray: the same figures as from one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers

from qins.fidelity import Settings, evaluate_one

ray = pytest.importorskip("ray", reason="needs Ray: make test-ray")
from tiny import COMMON  # noqa: E402
from tokens import save_tokenizer, sharp_llama  # noqa: E402
from tokens import text as words  # noqa: E402

from qins.checkpoint import quantize_checkpoint  # noqa: E402
from qins.cluster import RayWindows, evaluating  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture
def models(tmp_path):
    sharp_llama().save_pretrained(tmp_path / "float")
    save_tokenizer(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "codes")
    return str(tmp_path / "codes"), str(tmp_path / "float")


def settings(work):
    return Settings(text=words(2048), tokens=600, window=64, new_tokens=12, directory=work)


def same(a, b):
    """Check that the figures are the same, but for times and memory."""
    (a,), (b,) = a.measured, b.measured
    for name in ("kl", "top", "other_top", "top5", "loss", "other_loss"):
        assert torch.equal(getattr(a.comparison, name), getattr(b.comparison, name))
    assert (a.greedy_same, a.forced, a.layers, a.bits, a.bytes) == (b.greedy_same, b.forced, b.layers, b.bits, b.bytes)


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.suffix in (".npy", ".safetensors")}


def test_same_figures(connected, models, tmp_path, monkeypatch):
    """Also if a worker is killed in the middle of a window."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = evaluate_one(*models, settings(tmp_path / "one"))
        killed, original = tmp_path / "killed", evaluating.compare

        def compare(phase, i):
            if i == 3 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(phase, i)

        monkeypatch.setattr(evaluating, "compare", compare)
        same(evaluate_one(*models, settings(tmp_path / "ray"), windows=RayWindows()), expected)
    finally:
        torch.set_num_threads(before)
    assert killed.exists()
    assert len(expected.items) == 10
    assert files(tmp_path / "ray") == files(tmp_path / "one")


def test_same_figures_of_an_encoder(connected, tmp_path):
    """Its hidden states are compared."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**COMMON)).save_pretrained(tmp_path / "float")
    save_tokenizer(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "codes")
    pair = str(tmp_path / "codes"), str(tmp_path / "float")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = evaluate_one(*pair, settings(tmp_path / "one"))
        got = evaluate_one(*pair, settings(tmp_path / "ray"), windows=RayWindows())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got.measured[0].similarity.tokens, expected.measured[0].similarity.tokens)


def test_command_line(cluster, models, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(2048))
    command = [sys.executable, "-m", "qins.cli", "eval", models[0], "--against", models[1], "--text", str(text),
               "--tokens", "300", "--window", "64", "--json"]  # fmt: skip
    with_ray = [*command, "--ray", cluster.address]
    done = subprocess.run([*with_ray, "--work", str(tmp_path / "work")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = subprocess.run(command, capture_output=True, text=True)
    got, expected = (json.loads(d.stdout)["models"][0]["fidelity"] for d in (done, here))
    assert got == expected
    done = subprocess.run(with_ray, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ray: expected --against with the original, and --work" in done.stderr
