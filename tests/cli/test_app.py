"""The command line: wrong input and its error messages."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
from kinds import MAKERS
from terminal import as_shell
from tokens import save_tokenizer

import qins

pytestmark = pytest.mark.once


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line as a shell does; return (exit code, stdout, stderr with line breaks replaced by spaces)."""

    def run(*args):
        code, out, err = as_shell(monkeypatch, capfd, *args)
        return code, out, " ".join(err.split())

    return run


KINDS = ["llama", "bert", "vit", "t5", "whisper", "clip"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny random models, by kind."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        MAKERS[kind]().save_pretrained(root / kind)
        save_tokenizer(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("whisper", "WhisperForConditionalGeneration"),
        ("bert", "BertModel"),
        ("t5", "T5ForConditionalGeneration"),
        ("vit", "ViTModel"),
        ("clip", "CLIPModel"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "-p", "w11"], ["chat"], ["demo", "--model"]], ids=lambda c: c[0])
def test_only_causal_models_talk(run, models, kind, architecture, command):
    said = f"error: {models[kind]}: expected a causal language model, config.json has the architecture {architecture}"
    code, out, err = run(*command, models[kind])
    assert code == 1
    assert said in (err or " ".join(out.split()))


@pytest.mark.parametrize(
    "command", [["generate", "/nope", "-p", "w11"], ["chat", "/nope"], ["demo", "--model", "/nope"]]
)
def test_no_such_model(run, tmp_path, command):
    quantize = run("quantize", "/nope", tmp_path / "out")
    assert quantize[0] == 1
    assert "error: /nope: neither a directory nor an available model on the hub: " in quantize[2]
    code, out, err = run(*command)
    assert code == 1
    assert quantize[2] in (err or " ".join(out.split()))


def test_too_little_memory(run, models, tmp_path, monkeypatch):
    monkeypatch.setattr("qins.system.machine.available_bytes", lambda swap: 1000)
    code, out, err = run("quantize", models["llama"], tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {models['llama']}")
    assert err.endswith(" bytes of memory, 1,000 are available")


def test_version():
    """Without importing torch, which takes seconds."""
    code = "import sys; from qins import cli; sys.argv[1:] = ['--version']\n"
    code += "try: cli.main()\nfinally: print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [
        f"qins {qins.__version__}",
        f"instruction sets: {', '.join(qins.isas())}",
        f"torch {metadata.version('torch')}",
        f"transformers {metadata.version('transformers')}",
        "False",
    ]


def test_the_demos_snr():
    """Of 3 parts of the weights at 20 dB and one at 30 dB: noise of 0.03 and 0.001, of 4."""
    from qins.cli.demo import _pooled_snr
    from qins.nn import ConversionReport
    from qins.nn.report import ConvertedModule

    parts = [ConvertedModule("a", (3, 100), "log8", 64, 1200, 310, 20.0)]
    parts.append(ConvertedModule("b", (1, 100), "log8", 64, 400, 104, 30.0))
    assert _pooled_snr(ConversionReport(converted=parts)) == pytest.approx(21.1070, abs=1e-3)
