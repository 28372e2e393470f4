"""Codes in huge pages: the same codes, wherever they are."""

from __future__ import annotations

import copy
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

import qins
from qins.system import arena_for, huge_pages, rounded

pytestmark = pytest.mark.skipif(not huge_pages._are_there(), reason="NOT RUN: this system has no huge pages")


def in_huge_pages(address: int) -> int:
    """Return the bytes in huge pages of the mapping that has this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            begin, end = (int(n, 16) for n in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("AnonHugePages"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.fixture
def of_any_size(monkeypatch):
    monkeypatch.setattr(huge_pages, "_LEAST", 1)


def test_arrays_of_an_arena(of_any_size):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, shape).astype(dtype) for shape, dtype in [
        ((5, 7), np.uint8), ((3,), np.float32), ((2, 1000), np.uint16), ((), np.float64), ((0, 4), np.uint8),
        ((9, 2000), np.uint8),
    ]]  # fmt: skip
    arrays.append(arrays[-1].T)
    arena = arena_for(sum(rounded(a.nbytes) for a in arrays))
    copies = [arena.copy(a) for a in arrays]
    for a, b in zip(arrays, copies, strict=True):
        assert np.array_equal(a, b)
        assert a.dtype == b.dtype
        assert b.flags.c_contiguous
        assert b.nbytes == 0 or b.ctypes.data % 64 == 0
    copies[0][...] = 1
    copies[2][...] = 2
    assert np.array_equal(copies[1], arrays[1])
    assert np.array_equal(copies[-1], arrays[-1])


def test_a_large_arena_is_in_huge_pages():
    array = np.ones((64 << 20) // 4, np.float32)
    copied = arena_for(array.nbytes).copy(array)
    if in_huge_pages(copied.ctypes.data) == 0:
        pytest.skip("NOT RUN: the system has no huge page left")
    assert in_huge_pages(copied.ctypes.data) >= 32 << 20


def test_without_an_arena(of_any_size, monkeypatch):
    assert arena_for(1000) is not None
    monkeypatch.setenv("QINS_HUGE_PAGES", "0")
    assert arena_for(1000) is None
    monkeypatch.setenv("QINS_HUGE_PAGES", "yes")
    with pytest.raises(ValueError, match="QINS_HUGE_PAGES: expected 0 or 1, got 'yes'"):
        arena_for(1000)
    monkeypatch.delenv("QINS_HUGE_PAGES")
    assert arena_for(1 << 60) is None  # more than there is
    with monkeypatch.context() as m:
        m.setattr(huge_pages, "available_bytes", lambda: 1100)
        assert arena_for(1000) is None
        m.setattr(huge_pages, "available_bytes", lambda: None)  # unknown
        assert arena_for(1000) is not None
        assert arena_for(1 << 60) is None  # no such address space
    with monkeypatch.context() as m:
        m.setattr(mmap, "MADV_HUGEPAGE", -1)  # so that madvise fails
        assert arena_for(1000) is None
    monkeypatch.setattr(huge_pages, "_LEAST", 1001)
    assert arena_for(1000) is None


def test_systems_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "enabled")
    assert not huge_pages._are_there()
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert not huge_pages._are_there()
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages._are_there()
    monkeypatch.setattr(sys, "platform", "win32")
    assert not huge_pages._are_there()


# -- models --------------------------------------------------------------------------------------------


def places(model):
    return {n: b.data_ptr() for n, b in model.named_buffers(remove_duplicate=False)}


@pytest.mark.parametrize("codec", ["log8", "log4", "golden", "log9"])
def test_models_are_the_same_elsewhere(of_any_size, tmp_path, monkeypatch, codec):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
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
        assert np.array_equal(qins.Decoder.open(tmp_path / "moved").logits(tokens), want)


def test_a_model_without_memory_for_it_stays(of_any_size, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(huge_pages, "available_bytes", lambda: 1000)
    model = torch.nn.Sequential(torch.nn.Linear(128, 128))
    qins.convert(model)
    at = places(model)
    from qins.nn import place_codes

    assert place_codes(model, from_file=False) == 0
    assert places(model) == at
    monkeypatch.setattr(huge_pages, "available_bytes", lambda: None)
    assert place_codes(model, from_file=False) >= 128 * 128
    assert places(model) != at


def test_what_is_not_moved(of_any_size):
    torch = pytest.importorskip("torch")
    from qins.nn import place_codes

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
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from peak import peak_memory

    for name, hidden in {"warm": 64, "out": 1024}.items():
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=8, vocab_size=200)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        qins.convert(model)
        model.save_pretrained(tmp_path / name)
    warm_up = "import transformers\ntransformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/warm')"
    lines = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/out")
tensors = [*model.parameters(), *model.buffers()]
assert all(t.data_ptr() % 64 == 0 for t in tensors if t.nbytes >= 4096 and t.dtype.itemsize == 1)
"""
    peak, held = peak_memory(warm_up, lines, tmp_path)
    assert held > 64e6
    assert peak < 1.3 * held
