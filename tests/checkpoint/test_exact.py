"""qins quantize --exact and qins restore: the original of a converted checkpoint, bit for bit."""

from __future__ import annotations

import base64
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qins
from qins.checkpoint import quantize_checkpoint, quantizing
from qins.checkpoint.recording import ItemRecorder
from qins.files import RestoredCheckpoint, exact_bytes, inspect, restore_checkpoint
from qins.files.exact import packed_text

transformers = pytest.importorskip("transformers")
from originals import save, tree, whole_tensors  # noqa: E402
from tiny import make, outputs  # noqa: E402
from tiny_experts import MODELS as MOE  # noqa: E402
from tiny_experts import V5  # noqa: E402
from tiny_experts import make as moe  # noqa: E402
from tokens import text as words  # noqa: E402

pytestmark = pytest.mark.once


def restored(tmp_path, config=None, **options):
    """Convert `float` to `out` and restore `back`, which must be the same; return the result of the conversion."""
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "out", config, exact=True, **options)
    told = restore_checkpoint(tmp_path / "out", tmp_path / "back")
    assert told["changed"] == []
    assert tree(tmp_path / "back") == tree(tmp_path / "float")
    assert result["exact_bytes"] == exact_bytes(tmp_path / "out") > 0
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", ["log8", "log9", "golden", "log4"])
def test_every_codec(tmp_path, codec, dtype):
    model = save(make("llama"), tmp_path / "float", dtype)
    restored(tmp_path, qins.QinsConfig(codec))
    # the codes are those of a conversion without it, and run without its files
    quantize_checkpoint(tmp_path / "float", tmp_path / "plain", qins.QinsConfig(codec))
    for file in (tmp_path / "out").glob("exact-*.safetensors"):
        file.unlink()
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    assert outputs(qins.load(tmp_path / "out")).shape == outputs(model.float()).shape
    with pytest.raises(FileNotFoundError, match=r"no exact-\*.safetensors in it; `qins quantize --exact` writes"):
        restore_checkpoint(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "bert", "phi3"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_architectures(tmp_path, name, embeddings):
    """Transposed weights; embeddings as codes, tied or not."""
    save(make(name), tmp_path / "float")
    restored(tmp_path, qins.QinsConfig(lm_head=True, embeddings=embeddings))
    assert whole_tensors(tmp_path / "out") == []


@pytest.mark.parametrize("name", MOE)
def test_experts(tmp_path, name):
    """Experts stored one by one, stacked, or stacked and transposed; none of their weights is stored whole."""
    save(moe(name), tmp_path / "float")
    restored(tmp_path)
    assert whole_tensors(tmp_path / "out") == []


def test_several_files(tmp_path):
    save(make("llama"), tmp_path / "float", max_shard_size="40KB")
    restored(tmp_path)
    assert len(list((tmp_path / "out").glob("exact-model-0*.safetensors"))) > 2


@pytest.mark.skipif(not V5, reason="transformers 4 has these experts as linear layers")
def test_experts_over_several_files(tmp_path):
    save(moe("mixtral"), tmp_path / "float", max_shard_size="40KB")
    restored(tmp_path)


def test_calibrated(tmp_path):
    save(make("llama"), tmp_path / "float")
    from qins.hf import Calibration

    restored(tmp_path, calibration=Calibration(words(2000), 512))


def test_tensors_of_all_kinds(tmp_path):
    """A stored copy of a tied embedding, numbers that are NaN, infinite or -0 in what stays floats, other dtypes."""
    save(make("llama tied"), tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.norm.weight"][:4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-39])
    state["model.norm.weight"].view(torch.int16)[4] = 0x7FA3  # a NaN with a payload
    state["model.layers.0.self_attn.q_proj.weight"][0, :3] = torch.tensor([-0.0, 0.0, 1e-39])
    state["extra.counts"] = torch.arange(5)
    save_file(state, file, {"format": "pt", "made": "by hand"})
    restored(tmp_path, qins.QinsConfig(lm_head=True))
    assert whole_tensors(tmp_path / "out") == []


def test_an_interrupted_run_resumes(tmp_path):
    save(make("llama"), tmp_path / "float", max_shard_size="40KB")
    restored(tmp_path)
    first = sorted((tmp_path / "back").glob("*.safetensors"))[0]
    kept = first.stat().st_mtime_ns
    for file in sorted((tmp_path / "back").iterdir())[1::2]:
        if file != first:
            file.unlink()
    (tmp_path / "back" / "config.json.tmp").write_text("")
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "float")
    assert first.stat().st_mtime_ns == kept


def test_parts_left_beside_a_complete_file(tmp_path):
    """As a process leaves them that is killed after a shard is complete and before they are deleted."""
    save(make("llama"), tmp_path / "float", max_shard_size="40KB")
    quantize_checkpoint(tmp_path / "float", tmp_path / "whole", exact=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qins.checkpoint.quantizing._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    first = sorted((tmp_path / "out").glob("exact-*.safetensors"))[0]
    first.with_name(first.name + ".parts").write_bytes(b"x")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_is_not_overwritten(tmp_path):
    save(make("llama"), tmp_path / "float")
    restored(tmp_path)
    (tmp_path / "back" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(FileExistsError, match=r"model.safetensors: differs from the original; nothing is overwritten"):
        restore_checkpoint(tmp_path / "out", tmp_path / "back")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(FileExistsError, match=r"expected an empty directory or a restored model, got notes.txt in it"):
        restore_checkpoint(tmp_path / "out", tmp_path / "mine")
    with pytest.raises(FileExistsError, match="expected a directory or nothing, got a file"):
        restore_checkpoint(tmp_path / "out", tmp_path / "mine" / "notes.txt")


def test_files_beside_the_weights_that_changed(tmp_path):
    save(make("llama"), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    with (tmp_path / "out" / "tokenizer.json").open("a") as f:
        f.write("\n")
    (tmp_path / "out" / "generation_config.json").unlink()
    told = restore_checkpoint(tmp_path / "out", tmp_path / "back")
    assert told["changed"] == ["generation_config.json", "tokenizer.json"]
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "float" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def damaged(tmp_path, file, change):
    """Convert, change a file's metadata or tensors, and restore into an empty directory."""
    state, name = load_file(tmp_path / "out" / file), tmp_path / "out" / file
    with safe_open(name, "pt") as f:
        metadata = f.metadata()
    about = json.loads(metadata["qins_exact"]) if "qins_exact" in metadata else {}
    change(state, about)
    save_file(state, name, metadata | ({"qins_exact": json.dumps(about)} if about else {}))
    shutil.rmtree(tmp_path / "back", ignore_errors=True)
    restore_checkpoint(tmp_path / "out", tmp_path / "back")


LAYER = "model.layers.0.mlp.up_proj"


def place(**changes):
    return lambda state, about: about["tensors"][f"{LAYER}.weight"].update(changes)


def instead(**place):
    return lambda state, about: about["tensors"].update({f"{LAYER}.weight": place})


def header_of(text):
    return lambda state, about: about.update(header=packed_text(len(text).to_bytes(8, "little") + text.encode()))


DAMAGE = {  # of exact-model.safetensors, but for the first
    "another code": (lambda s, a: s[f"{LAYER}.codes"][3].add_(1), "damaged"),
    "bits": (lambda s, a: s[LAYER].__setitem__(-1, 77), "are damaged, or not those of one"),
    "no stream": (lambda s, a: s.pop(LAYER), f"holds '{LAYER}'"),
    "no place": (lambda s, a: a["tensors"].pop(f"{LAYER}.weight"), "tells where its bits are"),
    "no stored tensor": (
        instead(stored="nope", checksum=""),
        "no tensor nope, which restores model",
    ),
    "no checksum": (instead(stored="nope"), "up_proj.weight: a checksum, got {'stored': 'nope'}"),
    "a list": (lambda s, a: a["tensors"].update({"x": ["layer"]}), r"x: a checksum, got \['layer'\]"),
    "no header": (lambda s, a: a.pop("header"), "expected header of type str, got None"),
    "infinite": (lambda s, a: a.update(size=float("inf")), "expected size of type int, got inf"),
    "other's type": (lambda s, a: a.update(others=[]), r"expected others of type dict, got \[\]"),
    "other's place": (lambda s, a: a["others"].update(x=None), "a checksum or bytes of x, got None"),
    "row": (place(row=-1), "row as a number, got -1"),
    "own name": (lambda s, a: a.update(file="config.json.tmp"), "expected files of other names than 'config.json.tmp'"),
    "circle": (instead(copy=f"{LAYER}.weight", checksum=""), "tells where its bits are"),
    "two places": (place(raw="other"), "up_proj.weight: one place, got"),
    "another layer": (place(layer="other"), "no codes of other"),
    "matrix": (place(matrix=7), "expected a matrix below"),
    "path": (lambda s, a: a.update(file="../up.safetensors"), "expected the name of a file"),
    "other path": (lambda s, a: a["others"].update({"/etc/x": {"sha256": ""}}), "expected the name of a file"),
    "header": (lambda s, a: a.update(header="!"), "its stored bytes are damaged"),
    "bomb": (lambda s, a: a.update(header=packed_text(bytes(101 << 20))), "are damaged: more than 104,857,600 bytes"),
    "cut header": (
        lambda s, a: a.update(header=base64.b64encode(base64.b64decode(a["header"])[:-9]).decode()),
        "its stored bytes are damaged: truncated",
    ),
    "size": (lambda s, a: a.update(size=1), "its stored header is damaged: expected 1 bytes"),
    "version": (lambda s, a: a.update(version=9), "expected version 1, got 9"),
    "no offsets": (header_of('{"a":{"dtype":"U8","shape":[0],"data_offsets":[]}}'), "its stored header is damaged"),
    "nested header": (header_of('{"a":' * 100_000), "its stored header is damaged"),
    "sum": (lambda s, a: a.update(sha256="0" * 64), "expected SHA-256 0000"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage(tmp_path, what):
    save(make("llama"), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    change, match = DAMAGE[what]
    file = "model.safetensors" if what == "another code" else "exact-model.safetensors"
    with pytest.raises(ValueError, match=match):
        damaged(tmp_path, file, change)
    assert not list((tmp_path / "back").glob("*.safetensors*") if (tmp_path / "back").exists() else [])
    assert not (tmp_path / "up.safetensors").exists()


def test_restored_tensors_are_checked(tmp_path):
    save(make("llama"), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    file = tmp_path / "out" / "model.safetensors"
    whole = file.read_bytes()
    for key, change in (
        (f"{LAYER}.scale", lambda t: t.mul_(2)),
        (f"{LAYER}.codes", lambda t: t[3].bitwise_xor_(128)),
        ("model.norm.weight", lambda t: t.mul_(2)),
    ):
        state = load_file(file)
        change(state[key])
        save_file(state, file, {"format": "pt"})
        with pytest.raises(ValueError, match="damaged"):
            RestoredCheckpoint(tmp_path / "out").load(f"{LAYER}.weight" if "norm" not in key else key)
        file.write_bytes(whole)


def test_what_is_not_restored_is_named(tmp_path):
    save(make("llama"), tmp_path / "float")
    (tmp_path / "float" / "sub").mkdir()
    for name in ("consolidated.safetensors", "vocab.pt", "qins.lock"):
        (tmp_path / "float" / name).write_bytes(b"x")
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    assert result["not_restored"] == ["consolidated.safetensors", "qins.lock", "sub/", "vocab.pt"]
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    missing = {p.name for p in (tmp_path / "float").iterdir()} - {p.name for p in (tmp_path / "back").iterdir()}
    assert missing == {"consolidated.safetensors", "qins.lock", "sub", "vocab.pt"}


def test_files_of_unusual_names(tmp_path):
    """An index that names a file without the usual suffix; tensors that nobody uses, named as fields of codes are."""
    save(make("llama"), tmp_path / "float")
    (tmp_path / "float" / "model.safetensors").rename(tmp_path / "float" / "model.sft")
    state = load_file(tmp_path / "float" / "model.sft")
    state["lm_head.codes"] = torch.zeros(3)
    save_file(state, tmp_path / "float" / "model.sft", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model.sft")}
    (tmp_path / "float" / "model.safetensors.index.json").write_text(json.dumps(index))
    restored(tmp_path)
    state[f"{LAYER}.mu"] = torch.zeros(())
    save_file(state, tmp_path / "float" / "model.sft", {"format": "pt"})
    index["weight_map"][f"{LAYER}.mu"] = "model.sft"
    (tmp_path / "float" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"up_proj.mu: a tensor has the name that a field of codes needs"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "other")


def test_nothing_is_written_through_links(tmp_path):
    save(make("llama"), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    (tmp_path / "back").mkdir()
    (tmp_path / "victim").write_text("mine")
    for name in ("model.safetensors.tmp", "config.json.tmp"):
        (tmp_path / "back" / name).symlink_to(tmp_path / "victim")
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "victim").read_text() == "mine"
    assert tree(tmp_path / "back") == tree(tmp_path / "float")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "qins.lock").symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="qins.lock"):
        restore_checkpoint(tmp_path / "out", tmp_path / "linked")
    assert not (tmp_path / "new").exists()


def test_spools_and_copies_replace_links(tmp_path, monkeypatch):
    """What a conversion writes besides the weights: spools of residuals, and copies of a tokenizer's files."""
    save(make("llama"), tmp_path / "float")
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("mine")

    def recorder(*args):  # after the check that the directory is empty
        for name in ("exact-model.safetensors.parts", "tokenizer.json", "tokenizer.json.tmp"):
            (out / name).symlink_to(victim)
        return ItemRecorder(*args)

    monkeypatch.setattr(quantizing, "ItemRecorder", recorder)
    quantize_checkpoint(tmp_path / "float", out, exact=True)
    assert victim.read_text() == "mine"
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "float" / "tokenizer.json").read_bytes()
    assert restore_checkpoint(out, tmp_path / "back")["changed"] == []


def test_a_shape_that_its_bytes_do_not_have(tmp_path):
    save(make("llama"), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    restored = RestoredCheckpoint(tmp_path / "out")
    name = "model.norm.weight"
    restored.tensors[name] = replace(restored.tensors[name], shape=(7, 7))
    with pytest.raises(ValueError, match="expected 128 bytes for its shape"):
        restored.load(name)


def test_what_is_no_directory_of_codes(tmp_path):
    save(make("llama"), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    with pytest.raises(FileExistsError, match="expected another directory than that of the codes"):
        restore_checkpoint(tmp_path / "out", tmp_path / "out")
    with pytest.raises(NotADirectoryError, match="expected the directory of a converted checkpoint, got a file"):
        restore_checkpoint(tmp_path / "out" / "model.safetensors", tmp_path / "back")
    (tmp_path / "out" / "exact-model.safetensors").write_bytes(b"garbage")
    assert any("exact-model.safetensors" in p for p in inspect(tmp_path / "out").problems)


def test_a_full_disk(tmp_path, monkeypatch):
    save(make("llama"), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(OSError, match=r"back: needs [\d,]+ bytes, the disk has 100 free"):
        restore_checkpoint(tmp_path / "out", tmp_path / "back")


def test_what_cannot_be_restored(tmp_path):
    save(make("llama"), tmp_path / "float", torch.float32)
    with pytest.raises(ValueError, match="exact restoring expects bfloat16 or float16, got float32: the low 16 bits"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    assert not (tmp_path / "out").exists()
    model = make("llama").bfloat16()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "torch")
    torch.save(model.state_dict(), tmp_path / "torch" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="exact restoring expects floats in safetensors files, got torch files"):
        quantize_checkpoint(tmp_path / "torch", tmp_path / "out", exact=True)


def test_inspect_shows_both_sizes(tmp_path):
    save(make("llama"), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    report = inspect(tmp_path / "out")
    assert report.exact_bytes == exact_bytes(tmp_path / "out")
    weights = sum(a * b for a, b in (layer.shape for layer in report.layers))
    assert report.restoring_bits_per_weight == 8 * report.exact_bytes / weights
    assert f"restoring  the original: {report.exact_bytes:,} bytes more" in str(report)
    assert inspect(tmp_path / "float").exact_bytes == 0


def test_many_threads_restore(tmp_path):
    save(moe("gpt_oss"), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", exact=True)
    expected, restored = load_file(tmp_path / "float" / "model.safetensors"), RestoredCheckpoint(tmp_path / "out")
    assert set(restored.tensors) == set(expected)
    with ThreadPoolExecutor(8) as pool:
        for key, tensor in pool.map(lambda k: (k, restored.load(k)), [*expected] * 10):
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.skipif(not V5, reason="transformers 4 reads whole state dicts")
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_from_pretrained_restores(tmp_path, name):
    """The original's weights and logits, bit for bit, without writing its files; the model is an ordinary one."""
    save(moe(name) if name in MOE else make(name), tmp_path / "float", max_shard_size="40KB")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", qins.QinsConfig(lm_head=True), exact=True)
    cls = getattr(transformers, json.loads((tmp_path / "float" / "config.json").read_text())["architectures"][0])
    expected = cls.from_pretrained(tmp_path / "float")
    model = cls.from_pretrained(tmp_path / "out", quantization_config=qins.QinsConfig(restore=True))
    assert model.dtype == torch.bfloat16
    assert torch.equal(outputs(model), outputs(expected))
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert not hasattr(model.config, "quantization_config")
    for one, path in ((model, "again"), (expected, "expected")):
        one.save_pretrained(tmp_path / path)
    assert tree(tmp_path / "again") == tree(tmp_path / "expected")
    for file in (tmp_path / "out").glob("exact-*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="writes what restores the original"):
        cls.from_pretrained(tmp_path / "out", quantization_config=qins.QinsConfig(restore=True))
    with pytest.raises(ValueError, match="restore: expected a checkpoint of codes, got one of floats"):
        cls.from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig(restore=True))


@pytest.mark.skipif(not V5, reason="restore=True needs transformers 5")
def test_loading_the_original_from_the_hub(tmp_path, monkeypatch):
    """transformers downloads only the codes."""
    save(make("llama"), tmp_path / "float")
    restored(tmp_path)
    revision = "0123456789" * 4
    cached = tmp_path / "cache" / "models--me--tiny"
    snapshot = cached / "snapshots" / revision
    shutil.copytree(tmp_path / "out", snapshot, ignore=lambda _, names: [n for n in names if n.startswith("exact-")])
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    asked = []

    def download(name, **options):
        asked.append((name, options))
        shutil.copytree(tmp_path / "out", snapshot, ignore=lambda _, names: {*names} - {"exact-model.safetensors"},
                        dirs_exist_ok=True)  # fmt: skip

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = transformers.LlamaForCausalLM.from_pretrained(
        "me/tiny", quantization_config=qins.QinsConfig(restore=True), **options
    )
    assert torch.equal(outputs(model), outputs(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float")))
    where = {"revision": revision, "cache_dir": tmp_path / "cache", "allow_patterns": ["exact-*.safetensors"]}
    assert asked == [("me/tiny", where)]
