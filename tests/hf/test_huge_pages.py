"""Codes of models in huge pages: the same codes elsewhere."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peak import peak_memory

import qins
from qins.nn import place_codes
from qins.system import huge_pages

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.skipif(not huge_pages._are_there(), reason="NOT RUN: this system has no huge pages")


@pytest.fixture
def of_any_size(monkeypatch):
    monkeypatch.setattr(huge_pages, "_LEAST", 1)


def places(model):
    return {n: b.data_ptr() for n, b in model.named_buffers(remove_duplicate=False)}


@pytest.mark.parametrize("codec", ["log8", "log4", "golden", "log9"])
def test_models_are_the_same_elsewhere(of_any_size, tmp_path, monkeypatch, codec):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 160}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "floats")
    config = qins.QinsConfig(codec=codec, embeddings=True, lm_head=True)
    ids = torch.arange(3, 20)[None]

    def loaded(name, huge, **how):
        monkeypatch.setenv("QINS_HUGE_PAGES", "01"[huge])
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, **how).eval()

    plain, moved = (loaded("floats", huge, quantization_config=copy.deepcopy(config)) for huge in (False, True))
    plain.save_pretrained(tmp_path / "plain")
    moved.save_pretrained(tmp_path / "moved")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "moved" / name).read_bytes()
    again = [loaded("moved", huge) for huge in (False, True)]
    with torch.no_grad():
        want = plain(ids).logits
        assert all(torch.equal(m(ids).logits, want) for m in (moved, *again, copy.deepcopy(moved)))
    for model in (moved, again[1]):
        at = places(model)
        codes = [p for n, p in at.items() if model.get_buffer(n).nbytes >= 4096]
        assert len(codes) > 14
        assert all(p % 64 == 0 for p in codes)
        assert max(codes) - min(codes) < 1 << 20  # in one piece
        name = model.lm_head._names[0]
        assert model.lm_head._buffers[name] is model.model.embed_tokens._buffers[name]
        assert str(qins.memory_report(model)) == str(qins.memory_report(plain))
    tokens = [*range(3, 20)]
    if codec != "golden":
        monkeypatch.setenv("QINS_HUGE_PAGES", "0")
        want = qins.Decoder.open(tmp_path / "moved").logits(tokens)
        monkeypatch.setenv("QINS_HUGE_PAGES", "1")
        decoder = qins.Decoder.open(tmp_path / "moved")
        assert np.array_equal(decoder.logits(tokens), want)
        encoded = [e for e in decoder._kept if isinstance(e, qins.EncodedArray)]
        at = [f.ctypes.data for e in encoded for f in e.fields.values() if f.nbytes >= 4096]
        assert len(at) >= 14
        assert all(p % 64 == 0 for p in at)
        assert max(at) - min(at) < 1 << 20


def test_a_model_without_memory_for_it_stays(of_any_size, monkeypatch):
    monkeypatch.setattr(huge_pages, "available_bytes", lambda: 1000)
    model = torch.nn.Sequential(torch.nn.Linear(128, 128))
    qins.convert(model)
    at = places(model)
    assert place_codes(model, from_file=False) == 0
    assert places(model) == at
    monkeypatch.setattr(huge_pages, "available_bytes", lambda: None)
    assert place_codes(model, from_file=False) >= 128 * 128
    assert places(model) != at


def test_what_is_not_moved(of_any_size):
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128), torch.nn.Linear(128, 128))
    qins.convert(model)
    model[0].codes = model[0].codes.share_memory_()
    model[1].to("meta")
    at = model[0].codes.data_ptr()
    assert place_codes(model, from_file=False) == 128 * 128
    assert model[0].codes.data_ptr() == at
    assert model[1].codes.is_meta


@pytest.mark.long
def test_memory_while_loading(tmp_path):
    """Beside the copies there is a tensor of the file at a time."""
    for name, hidden in {"warm": 64, "out": 1024}.items():
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=8, vocab_size=200)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        qins.convert(model)
        model.save_pretrained(tmp_path / name)
    for opened, of_model in {
        "import transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained": "[*model.buffers()]",
        "model = qins.Decoder.open": "[f for e in model._kept if hasattr(e, 'fields') for f in e.fields.values()]",
    }.items():
        lines = f"{opened}(sys.argv[1] + '/out')\ntensors = {of_model}"
        peak, held = peak_memory(f"{opened}(sys.argv[1] + '/warm')", lines, tmp_path)
        assert held > 64e6
        assert peak < 1.3 * held
