"""qins.inspect: the contents of files, and that no file does harm."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import DAMAGES, damaged
from safetensors.torch import save_file
from small import converted, model
from torch import nn

import qins
from qins.codec import LOG_BITS
from qins.files import open_checkpoint, reading
from qins.files.inspection_report import _bars

pytestmark = pytest.mark.once


CODECS = [("golden", None), ("log9", None), ("log8", None), ("log8", 32), ("log8", 64), ("rational", None)]


@pytest.mark.parametrize(("codec", "group"), CODECS)
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_reports_what_is_there(tmp_path, codec, group, kind):
    m = converted(codec, group)
    path, original = tmp_path / "codes.bin", tmp_path / "floats.safetensors"
    torch.save(m.state_dict(), path) if kind == "torch" else save_file(m.state_dict(), path)
    save_file(model().state_dict(), original)
    report = qins.inspect(path, against=original)
    assert report.format == kind
    assert not report.problems
    assert [(la.name, la.codec, la.group_size) for la in report.layers] == [("0", codec, group), ("2", codec, group)]
    weights, held = 2 * 60 * 40, sum(t.numel() * t.element_size() for t in m.state_dict().values())
    assert report.tensor_bytes == held
    assert report.bytes_by_kind["stored"] == weights
    assert report.bytes_by_kind["sign"] == {"golden": weights, "log9": 40 * 8 + 60 * 5}.get(codec, 0)
    assert report.bytes_by_kind["other"] == 4 * (40 + 70)
    assert report.file_bytes == path.stat().st_size
    assert report.overhead_bytes == path.stat().st_size - held > 0
    assert report.float32_bytes == 4 * (weights + 40 + 70)
    assert report.compression_in_memory == report.float32_bytes / held
    assert report.compression_on_disk < report.compression_in_memory
    errors = {e.name: e for e in report.errors}
    for name in ("0", "2"):
        w, d = (x.get_submodule(name).weight.detach().double() for x in (model(), m))
        assert errors[name].snr_db == pytest.approx(float(10 * torch.log10(w.pow(2).sum() / (w - d).pow(2).sum())))
        assert errors[name].max_error == pytest.approx(float((w - d).abs().max()), rel=1e-5)
    assert errors["3"].snr_db == float("inf")
    text = str(report)
    assert codec in text
    assert f"{held:,}" in text
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("layer  codec"))
    assert set(lines[head + 1]) == {"-", " "}
    assert [line.split("  ")[0] for line in lines[head + 2 : head + 5]] == ["0", "2", "3"]  # names are at the left
    assert json.loads(report.to_json())["tensor_bytes"] == held


@pytest.mark.parametrize("codec", ["log6", "log5", "log4"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_packed_codes(tmp_path, codec, kind):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(72, 40), nn.Linear(40, 64, bias=False))
    floats, path = tmp_path / "floats.safetensors", tmp_path / "codes.bin"
    save_file(m.state_dict(), floats)
    original = copy.deepcopy(m)
    qins.convert(m, codec)
    torch.save(m.state_dict(), path) if kind == "torch" else save_file(m.state_dict(), path)
    report = qins.inspect(path, against=floats, histograms=True)
    assert not report.problems
    assert [(la.codec, la.group_size, la.shape) for la in report.layers] == [
        (codec, 32, (40, 72)),
        (codec, 32, (64, 40)),
    ]
    weights = 40 * 72 + 64 * 40
    assert report.bytes_by_kind["stored"] == weights * LOG_BITS[codec] // 8
    assert report.float32_bytes == 4 * (weights + 40)
    assert sum(sum(h) for h in report.histograms.values()) == weights
    for layer, error, before, after in zip(report.layers, report.errors, original, m, strict=True):
        w, d = before.weight.detach().double(), after.weight.double()
        assert layer.bytes == sum(b.nbytes for b in after.buffers())
        assert error.snr_db == pytest.approx(float(10 * torch.log10(w.pow(2).sum() / (w - d).pow(2).sum())))
    state = m.state_dict()
    torch.save(state | {f"0.codes{codec[3]}": state[f"0.codes{codec[3]}"][:, :-1].clone()}, tmp_path / "short.pt")
    assert "expected rows of a multiple of" in qins.inspect(tmp_path / "short.pt").problems[0]


def test_tied_weights_count_once(tmp_path):
    m = nn.ModuleDict({"a": nn.Linear(30, 30, bias=False), "b": nn.Linear(30, 30, bias=False)})
    m["b"].weight = m["a"].weight
    torch.save(m.state_dict(), tmp_path / "tied.pt")
    report = qins.inspect(tmp_path / "tied.pt")
    assert report.tensor_bytes == 3600
    assert report.tensors == 2


def test_wrapped_state_dicts_and_old_files(tmp_path):
    state = converted("golden").state_dict()
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "wrapped.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("wrapped.pt", "old.pt"):
        report = qins.inspect(tmp_path / name)
        assert len(report.layers) == 2
        assert not report.problems


@pytest.mark.parametrize("tensor", [torch.eye(4).to_sparse(), torch.zeros(4, device="meta")], ids=["sparse", "meta"])
def test_torch_tensors_without_values_in_order(tmp_path, monkeypatch, tensor):
    """The check of pickles refuses them; what it may let through under another torch is refused, too."""
    torch.save({"a": tensor}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="expected a state dict, got a pickle that calls torch"):
        qins.inspect(tmp_path / "a.pt")
    monkeypatch.setattr(reading, "_check_torch_file", lambda _: False)
    with pytest.raises(ValueError, match=r"a\.pt: a: expected a dense tensor, got torch\.\w+ on (cpu|meta)"):
        qins.inspect(tmp_path / "a.pt")


def test_a_qins_weight_linear(tmp_path):
    with pytest.warns(DeprecationWarning, match="log8"):
        layer = qins.rational.QINSWeightLinear(nn.Linear(30, 20), alpha=3.0)
    torch.save({f"x.{k}": v for k, v in layer.state_dict().items()}, tmp_path / "r.pt")
    report = qins.inspect(tmp_path / "r.pt")
    assert [(la.name, la.codec) for la in report.layers] == [("x", "rational")]


def sharded(directory: Path, kind: str) -> dict[str, torch.Tensor]:
    directory.mkdir(exist_ok=True)
    state = converted("log8", 32).state_dict()
    keys = list(state)
    suffix, stem = ("safetensors", "model") if kind == "safetensors" else ("bin", "pytorch_model")
    index = {"metadata": {}, "weight_map": {}}
    for i, part in enumerate((keys[:4], keys[4:])):
        name = f"{stem}-{i + 1:05}-of-00002.{suffix}"
        tensors = {k: state[k] for k in part}
        save_file(tensors, directory / name) if kind == "safetensors" else torch.save(tensors, directory / name)
        index["weight_map"] |= dict.fromkeys(part, name)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"quantization_config": {"group_size": 32}}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_sharded(tmp_path, kind):
    index = sharded(tmp_path, kind)
    report = qins.inspect(tmp_path)
    assert len(report.files) == 2
    assert [la.group_size for la in report.layers] == [32, 32]
    assert not report.problems
    first, second = sorted(set(index["weight_map"].values()))
    path = next(tmp_path.glob("*.index.json"))
    evil = copy.deepcopy(index)
    evil["weight_map"]["0.codes"] = "../" + first
    path.write_text(json.dumps(evil))
    with pytest.raises(ValueError, match="names of files beside it"):
        qins.inspect(tmp_path)
    evil["weight_map"]["0.codes"] = second
    path.write_text(json.dumps(evil))
    with pytest.raises(ValueError, match=r"no tensor '0\.codes'"):
        qins.inspect(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="JSON"):
        qins.inspect(tmp_path)
    path.write_text(json.dumps(index))
    (tmp_path / second).unlink()
    with pytest.raises(FileNotFoundError, match=second):
        qins.inspect(tmp_path)


def test_gguf(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("tokens", ["one", "two", "three"])
    writer.add_tensor("a", np.ones((4, 64), np.float32))
    writer.add_tensor("b", np.ones((4, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = qins.inspect(tmp_path / "m.gguf")
    assert report.format == "gguf"
    assert report.bytes_by_dtype == {"float32": 1024, "Q8_0": 272}
    assert open_checkpoint(tmp_path / "m.gguf").metadata == {"architecture": "llama"}
    data = (tmp_path / "m.gguf").read_bytes()
    harmless(tmp_path, data, "gguf")
    (tmp_path / "many.gguf").write_bytes(data[:8] + (1 << 60).to_bytes(8, "little") + data[16:])
    with pytest.raises(ValueError, match="entries in"):
        qins.inspect(tmp_path / "many.gguf")
    end = data.index(b"tokens") + 6 + 4 + 4  # after its name, its type, and the type of its elements
    assert data[end : end + 8] == (3).to_bytes(8, "little")
    for kind in (8, 0, 9):  # strings, bytes, arrays
        changed = data[: end - 4] + kind.to_bytes(4, "little") + (1 << 60).to_bytes(8, "little") + data[end + 8 :]
        (tmp_path / "long.gguf").write_bytes(changed)
        with pytest.raises(ValueError, match=r"long\.gguf: not a readable GGUF file"):
            qins.inspect(tmp_path / "long.gguf")
    monkeypatch.setattr(reading, "_ENTRIES", 2)
    with pytest.raises(ValueError, match="arrays of 3 elements in its header"):
        qins.inspect(tmp_path / "m.gguf")


@pytest.mark.parametrize("change", DAMAGES)
def test_problems_are_named(tmp_path, change):
    state = damaged(converted("golden").state_dict(), change)
    save_file(state, tmp_path / "bad.safetensors")
    report = qins.inspect(tmp_path / "bad.safetensors")
    assert len(report.problems) == 1
    assert "0" in report.problems[0]
    assert "PROBLEM" in str(report)
    expected = {"dtype": "not quantized", "missing": "log_max", "shape": "shape", "sign": "-1 or \\+1",
                "stored": "1 to 255", "range": "finite"}[change]  # fmt: skip
    assert re.search(expected, report.problems[0])


def test_against_something_else(tmp_path):
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    save_file({"other.weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="none of the same name"):
        qins.inspect(tmp_path / "a.safetensors", against=tmp_path / "b.safetensors")
    save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="expected shape"):
        qins.inspect(tmp_path / "a.safetensors", against=tmp_path / "c.safetensors")


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def zipped(path: Path, data: bytes, storage: bytes = b"\0" * 4) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/byteorder", "little")
        z.writestr("archive/version", "3\n")
        z.writestr("archive/data/0", storage)
    return path


def test_no_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(2), "b": Harm()}, "new.pt")
    torch.save({"a": torch.zeros(2), "b": Harm()}, "old.pt", _use_new_zipfile_serialization=False)
    torch.save(model(), "whole.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"a": Harm()}))
    zipped(Path("four.pt"), pickle.dumps({"a": Harm()}, 4))
    zipped(Path("bytes.pt"), b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
    for name in ("new.pt", "old.pt", "whole.pt", "plain.pt", "four.pt", "bytes.pt"):
        with pytest.raises(ValueError, match=name):
            qins.inspect(name)
    assert not Path("harmed").exists()


def test_a_small_file_that_claims_much(tmp_path):
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save({"a.weight": huge}, tmp_path / "expanded.pt")
    with pytest.raises(ValueError, match="more than the file holds"):
        qins.inspect(tmp_path / "expanded.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"\0" * 100_000_000)
    with pytest.raises(ValueError, match="compressed"):
        qins.inspect(tmp_path / "bomb.pt")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "much.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="truncated or damaged"):
        qins.inspect(tmp_path / "much.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20  # KiB


def harmless(tmp_path: Path, data: bytes, suffix: str) -> None:
    """Check that truncated and bit-flipped files give a ValueError or a report, and nothing else."""
    rng = np.random.default_rng(0)
    path = tmp_path / f"damaged.{suffix}"
    cuts = [int(c) for c in np.linspace(0, len(data) - 1, 60)]
    damaged = [data[:c] for c in cuts]
    for _ in range(150):
        broken = bytearray(data)
        broken[int(rng.integers(min(len(data), 3000)))] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(broken))
    refused = []
    for i, d in enumerate(damaged):
        path.write_bytes(d)
        try:
            qins.inspect(path)
        except ValueError as e:
            refused.append(str(e))
        else:
            assert i >= len(cuts) or i > 55, f"cut to {len(d)} of {len(data)} bytes and accepted"
    assert len(refused) >= 50
    assert not [m for m in refused if str(path) not in m]


@pytest.mark.filterwarnings("ignore")  # torch warns about the pickles
def test_damaged_files(tmp_path):
    state = converted("golden").state_dict()
    torch.save(state, tmp_path / "a.pt")
    harmless(tmp_path, (tmp_path / "a.pt").read_bytes(), "pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    harmless(tmp_path, (tmp_path / "old.pt").read_bytes(), "pt")
    save_file(state, tmp_path / "a.safetensors")
    harmless(tmp_path, (tmp_path / "a.safetensors").read_bytes(), "safetensors")


def test_not_there_and_not_a_model(tmp_path):
    with pytest.raises(FileNotFoundError):
        qins.inspect(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        qins.inspect(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ValueError, match="expected a safetensors, torch or GGUF file"):
        qins.inspect(tmp_path / "text.txt")
    for name in ("a.pt", "b.pt"):
        torch.save({"epoch": 3}, tmp_path / name)
    with pytest.raises(ValueError, match="expected a state dict"):
        qins.inspect(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="2 files"):
        qins.inspect(tmp_path)


@pytest.mark.parametrize("codec", ["log8", "log6", "log5", "log4", "golden", "log9", "rational"])
def test_histograms(tmp_path, codec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64))
    model[0].weight.data = torch.rand(64, 256) * 2 - 1  # every magnitude equally often
    qins.convert(model, codec)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    report = qins.inspect(tmp_path / "m.safetensors", histograms=True)
    (counts,) = report.histograms.values()
    assert len(counts) == 32
    assert sum(counts) == 64 * 256
    # levels farther from zero are farther apart, so each gets more weights
    assert sum(counts[16:]) > sum(counts[:16])
    assert "codes, from zero up" in str(report)
    assert any(bar in str(report) for bar in "▇█")
    assert json.loads(report.to_json())["histograms"] == report.histograms
    assert not qins.inspect(tmp_path / "m.safetensors").histograms


def test_group_sizes_without_a_config(tmp_path):
    """Of sizes that give the same number of groups, one that has been the default is the likeliest."""
    sizes = {"a": (320, 64), "b": (576, 192), "c": (384, 128), "d": (512, 256), "e": (320, 32)}
    state = {
        f"{name}.{k}": v
        for name, (cols, size) in sizes.items()
        for k, v in qins.QINSLinear.from_linear(nn.Linear(cols, 20), group_size=size).state_dict().items()
    }
    torch.save(state, tmp_path / "codes.pt")
    report = qins.inspect(tmp_path / "codes.pt")
    assert {layer.name: layer.group_size for layer in report.layers} == {
        name: size for name, (_, size) in sizes.items()
    }


def test_group_sizes_are_those_of_the_config(tmp_path):
    """Group sizes 192 and 256 give the same number of groups for 320 columns."""
    state = qins.QINSLinear.from_linear(nn.Linear(320, 20), group_size=192).state_dict()
    save_file({f"a.{k}": v for k, v in state.items()}, tmp_path / "model.safetensors")
    told = {"modules": {"a": ["log8", 192]}, "group_size": "default"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": told}))
    report = qins.inspect(tmp_path)
    assert [layer.group_size for layer in report.layers] == [192]


def test_bars():
    assert _bars([0, 1, 2, 4, 8]) == " ▁▂▄█"
    assert _bars([0, 1, 1000]) == " ▁█"  # what is there is seen
    assert _bars([]) == _bars([0]) == ""


@pytest.mark.parametrize(("mapped", "times"), [(1 << 26, 1), (1, 6)])
def test_many_tensors_of_a_file_are_loaded_without_opening_it_anew(tmp_path, monkeypatch, mapped, times):
    """Opening parses the header; but after many bytes a file is mapped anew, so that what was read leaves memory."""
    tensors = {f"t{i}": torch.full((3, 5), float(i)) for i in range(6)}
    save_file(tensors, tmp_path / "model.safetensors")
    opened = []
    original = reading.open_safetensors
    monkeypatch.setattr(reading, "open_safetensors", lambda path: opened.append(path) or original(path))
    monkeypatch.setattr(reading, "_MAPPED", mapped)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    opened.clear()
    loaded = {n: checkpoint.load(n) for n in tensors}
    assert len(opened) == times
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())
    elsewhere = pickle.loads(pickle.dumps(checkpoint))
    assert torch.equal(elsewhere.load("t2"), tensors["t2"])
    assert len(opened) == times + 1
