"""Ctrl-C and SIGTERM end a conversion soon, and leave nothing half-written; the next run completes it.

tests/trust/signals.py measures how soon; test_serve.py does the same to `qins serve`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from tokens import save_tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.long,
    pytest.mark.once,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals"),
]

SOON = 120  # seconds: far more than it takes, for loaded machines, and far less than a hang


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of 30 MB, which one thread converts in a second or more."""
    path = tmp_path_factory.mktemp("source") / "float"
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path, 256)
    return path


def tree(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def run(*arguments):
    command = [sys.executable, "-m", "qins.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if the tests run in the background
    )  # fmt: skip


def whole(*arguments):
    with run(*arguments) as process:
        told = process.communicate()
        assert process.returncode == 0, told


@pytest.fixture(scope="module")
def undisturbed(source):
    out = source.parent / "undisturbed"
    whole("quantize", source, out, "--codec", "log4", "--exact")
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("command", ["quantize", "restore"])
def test_an_interrupted_conversion(source, undisturbed, tmp_path, command, number):
    out = tmp_path / "out"
    given = [command, undisturbed, out]
    if command == "quantize":
        given = [command, source, out, "--codec", "log4", "--exact"]
    expected = tree(undisturbed if command == "quantize" else source)
    with run(*given) as process:
        while not list(out.glob("*.safetensors.tmp")) if out.exists() else True:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(number)
        _, told = process.communicate(timeout=SOON)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], told
    assert "Traceback" not in told
    left = tree(out)
    assert not [n for n in left if n.endswith((".tmp", ".parts", ".lock"))]
    assert {n: data for n, data in left.items() if n != "qins-progress.json"}.items() <= expected.items()
    assert "config.json" not in left
    whole(*given)
    assert tree(out) == expected
