"""The command line: wrong input and its error messages."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")
from tiny import make  # noqa: E402
from tokens import save_tokenizer  # noqa: E402

import qins  # noqa: E402
from qins import cli  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line as a shell does; return (exit code, stdout, stderr with line breaks replaced by spaces)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["qins", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as e:
            cli.main()
        out, err = capfd.readouterr()
        return e.value.code or 0, out, " ".join(err.split())

    return run


def small(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    encoder_decoder = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 160}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=160, **sizes))
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes))
    if kind == "t5":
        config = transformers.T5Config(vocab_size=160, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
        return transformers.T5ForConditionalGeneration(config)
    if kind == "whisper":
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = transformers.WhisperConfig(num_mel_bins=8, **encoder_decoder, **heads, **special)
        return transformers.WhisperForConditionalGeneration(config)
    if kind == "clip":
        vision = {**sizes, "image_size": 16, "patch_size": 8}
        config = transformers.CLIPConfig(text_config={**sizes, "vocab_size": 160}, vision_config=vision)
        return transformers.CLIPModel(config)
    return make(kind)


KINDS = ["llama", "bert", "vit", "t5", "whisper", "clip"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny random models, by kind."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        small(kind).save_pretrained(root / kind)
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
