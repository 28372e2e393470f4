"""qins quantize --exact and qins restore."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer.testing")
pytest.importorskip("tokenizers")
from terminal import as_shell, printed
from tokens import save_tokenizer, sharp_llama
from tokens import text as words

pytestmark = pytest.mark.once


def test_there_and_back(tmp_path):
    sharp_llama().bfloat16().save_pretrained(tmp_path / "float")
    save_tokenizer(tmp_path / "float")
    told = printed("quantize", tmp_path / "float", tmp_path / "out", "--exact")
    assert re.search(r"[\d,]+ bytes more restore the original: \d\d\.\d% of its bytes in all", told)
    report = json.loads(printed("inspect", tmp_path / "out", "--json"))
    assert report["exact_bytes"] == (tmp_path / "out" / "exact-model.safetensors").stat().st_size
    assert report["bits_per_weight"] < 9
    told = printed("restore", tmp_path / "out", tmp_path / "back", "--json")
    assert json.loads(told) == {
        "files": ["model.safetensors"],
        "bytes": (tmp_path / "float" / "model.safetensors").stat().st_size,
        "changed": [],
    }
    for file in (tmp_path / "float").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    (tmp_path / "out" / "tokenizer.json").unlink()
    told = printed("restore", tmp_path / "out", tmp_path / "again")
    assert "tokenizer.json: not restored: it is missing beside the codes" in told
    assert "1 files in" in told


def test_eval_proves_it(tmp_path, monkeypatch, capfd):
    sharp_llama().bfloat16().save_pretrained(tmp_path / "float")
    save_tokenizer(tmp_path / "float")
    (tmp_path / "text.txt").write_text(words(600))
    printed("quantize", tmp_path / "float", tmp_path / "out", "--exact")
    arguments = ("--against", tmp_path / "float", "--text", tmp_path / "text.txt", "--tokens", 128, "--restored")
    codes, restored = json.loads(printed("eval", tmp_path / "out", *arguments, "--json"))["models"]
    assert restored["name"] == "out, restored"
    assert restored["fidelity"]["kl_mean"] == restored["fidelity"]["kl_max"] == 0
    assert codes["fidelity"]["kl_mean"] > 0
    # another original: its outputs differ
    other = sharp_llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    other.bfloat16().save_pretrained(tmp_path / "float")
    code, _, told = as_shell(monkeypatch, capfd, "eval", tmp_path / "out", *arguments)
    assert code == 1
    assert "the restored model's outputs differ from the original's" in told
