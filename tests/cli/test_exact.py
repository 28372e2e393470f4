"""qins quantize --exact and qins restore."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer.testing")
pytest.importorskip("tokenizers")
from terminal import printed
from tokens import save_tokenizer, sharp_llama

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
