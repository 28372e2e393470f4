"""`qins eval`: wrong input gives an error of one line."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

transformers = pytest.importorskip("transformers")
from tiny import COMMON, make  # noqa: E402
from tokens import save_tokenizer, sharp_llama  # noqa: E402
from tokens import text as words  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float checkpoint whose next-token distributions are far from uniform."""
    path = tmp_path_factory.mktemp("model") / "float"
    sharp_llama().save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def text_file(source):
    path = source.parent / "text.txt"
    path.write_text(words(2048))
    return path


def save(path, model, **tokens):
    model.eval().save_pretrained(path)
    save_tokenizer(path, before="w1", after="w2", **tokens)
    return path


def refused(monkeypatch, capsys, *args):
    """Return the command's error message from stderr as one line; an exception with a traceback fails the test."""
    from qins import cli

    monkeypatch.setattr(sys, "argv", ["qins", "eval", *map(str, args)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 1
    said = capsys.readouterr().err
    said = " ".join(said[said.index("error:") :].split())
    assert len(said) < 600
    return said


def test_no_traceback(source, text_file, tmp_path, monkeypatch, capsys):
    def says(*args):
        return refused(monkeypatch, capsys, *args)

    text = ("--text", text_file, "--tokens", 200, "--window", 64)
    one = (*text, "--codec", "log8", "--no-peers")
    assert "nowhere: no such directory" in says(tmp_path / "nowhere", *one)
    assert "got a file" in says(text_file, *one)
    assert "No such file" in says(source, "--text", tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").touch()
    assert "expected at least 32 tokens, got 0" in says(source, "--text", tmp_path / "empty.txt")
    (tmp_path / "bare").mkdir()
    assert "bare: expected a directory or hub name of a model" in says(tmp_path / "bare", *one)
    for name in ("llama", "t5"):
        make(name).save_pretrained(tmp_path / name)
        assert f"{name}: expected a tokenizer beside the model" in says(tmp_path / name, *one)
    shutil.copytree(source, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\0" * 100)
    assert "damaged: expected a checkpoint of LlamaForCausalLM" in says(tmp_path / "damaged", *one)
    (tmp_path / "damaged" / "model.safetensors").unlink()
    assert "model.safetensors" in says(tmp_path / "damaged", *one)
    (tmp_path / "damaged" / "config.json").write_text("{")
    assert "damaged: expected a directory or hub name of a model" in says(tmp_path / "damaged", *one)
    assert "expected linear layers to quantize, got none" in says(save(tmp_path / "gpt2", make("gpt2")), *one)
    bert = save(tmp_path / "bert", make("bert"))
    assert "expected a tokenizer with a mask token" in says(bert, *one)
    encoder = save(tmp_path / "encoder", transformers.BertModel(transformers.BertConfig(**COMMON)))
    assert "max-kld: expected a model that predicts tokens" in says(encoder, *one, "--max-kld", 1)
    assert "task: expected a decoder, got an encoder" in says(encoder, *one, "--task", "x")
    small = transformers.BertModel(transformers.BertConfig(**(COMMON | {"hidden_size": 32})))
    said = says(save(tmp_path / "small", small), "--against", encoder, *text)
    assert "small: expected hidden states of 64 values" in said
    assert "expected LlamaForCausalLM" in says(encoder, "--against", source, *text)
    base = json.loads((save(tmp_path / "base", make("llama").model) / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(base | {"architectures": ["LlamaForCausalLM"]}))
    assert "expected all weights of LlamaForCausalLM, 1 are missing, such as lm_head" in says(tmp_path / "base", *one)
    few = make("llama")
    few.resize_token_embeddings(100)
    assert "expected a vocabulary of 160, as" in says(save(tmp_path / "few", few), "--against", source, *text)
    assert "expected a vocabulary of at least 160 tokens" in says(tmp_path / "few", *one)
