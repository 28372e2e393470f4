"""Conversions whose source or output is a URL, with fsspec's file system in memory."""

from __future__ import annotations

import json

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file

import qins
from qins.checkpoint import quantize_checkpoint
from qins.files import remote

transformers = pytest.importorskip("transformers")
from released import released  # noqa: E402
from tiny import make  # noqa: E402
from tiny_experts import V5  # noqa: E402
from tiny_experts import make as moe  # noqa: E402

pytestmark = pytest.mark.once

SOURCE, OUT = "memory://bucket/float", "memory://bucket/out"


@pytest.fixture(autouse=True)
def store(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda s: None)
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()


def tree(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def there(url):
    system = MemoryFileSystem()
    return {n.rpartition("/")[2]: system.cat_file(n) for n in system.ls(url.partition(":/")[2], detail=False)}


def upload(path):
    for file in path.iterdir():
        MemoryFileSystem().pipe_file(f"/bucket/float/{file.name}", file.read_bytes())


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "float"
    make("llama").bfloat16().save_pretrained(path, max_shard_size="40KB")
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    upload(path)
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.mark.parametrize("exact", [False, True])
def test_same_bytes(source, tmp_path, exact):
    expected = quantize_checkpoint(source, tmp_path / "out", exact=exact)
    assert quantize_checkpoint(SOURCE, OUT, exact=exact) == expected
    assert there(OUT) == tree(tmp_path / "out")
    quantize_checkpoint(SOURCE, tmp_path / "down", exact=exact)
    assert tree(tmp_path / "down") == tree(tmp_path / "out")
    quantize_checkpoint(source, "memory://bucket/up", exact=exact)
    assert there("memory://bucket/up") == tree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["experts", "tied", "fp8 block"])
def test_same_bytes_of_other_models(tmp_path, kind):
    settings = {}
    if kind == "experts":
        moe("mixtral").save_pretrained(tmp_path / "float", max_shard_size="40KB")
        path = tmp_path / "float"
    elif kind == "tied":
        make("llama tied").save_pretrained(tmp_path / "float")
        path, settings = tmp_path / "float", {"lm_head": True, "embeddings": True}
    else:
        path = released(tmp_path, make("llama"), kind)[0]
    upload(path)
    quantize_checkpoint(path, tmp_path / "out", qins.QinsConfig(**settings))
    quantize_checkpoint(SOURCE, OUT, qins.QinsConfig(**settings))
    assert there(OUT) == tree(tmp_path / "out")


@pytest.mark.skipif(not V5, reason="transformers 4 does not drop a stored copy")
def test_a_copy_that_differs_is_seen(tmp_path):
    """Whether a stored output embedding equals the input embedding is asked of the store, not of files with holes."""
    make("llama tied").save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"][3, 3] += 1
    save_file(state, file, {"format": "pt"})
    upload(tmp_path / "float")
    with pytest.raises(ValueError, match="ties it"):
        quantize_checkpoint(SOURCE, OUT, qins.QinsConfig(lm_head=True))


def test_resumed(source, tmp_path, monkeypatch):
    """What is complete is not written again, and the configuration comes last."""
    quantize_checkpoint(source, tmp_path / "expected")
    written, original = [], remote.RemoteFolder.put

    def put(self, path, file):
        if len(written) == 2:
            raise OSError("the network is gone")
        written.append(file)
        original(self, path, file)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="network is gone"):
        patch.setattr(remote.RemoteFolder, "put", put)
        quantize_checkpoint(SOURCE, OUT)
    names = [f"model-0000{i}-of" for i in (1, 2)]
    assert [n[:14] for n in written] == names
    assert sorted(n[:14] for n in there(OUT)) == [*names, "qins-progress."]
    with pytest.raises(FileExistsError, match="memory://bucket/out: holds an unfinished conversion of another source"):
        quantize_checkpoint(SOURCE, OUT, qins.QinsConfig("log4"))
    more = []
    monkeypatch.setattr(remote.RemoteFolder, "put", lambda s, p, f: more.append(f) or original(s, p, f))
    quantize_checkpoint(SOURCE, OUT)
    assert there(OUT) == tree(tmp_path / "expected")
    assert not {*more} & {*written}
    assert more[-1] == "config.json"


def test_refusals(source, tmp_path, store):
    with pytest.raises(ValueError, match="calibration expects directories"):
        quantize_checkpoint(SOURCE, OUT, calibration=qins.hf.Calibration("text"))
    store.pipe_file("/bucket/out/mine", b"precious")
    with pytest.raises(FileExistsError, match="memory://bucket/out: is not empty"):
        quantize_checkpoint(SOURCE, OUT)
    assert there(OUT) == {"mine": b"precious"}
    with pytest.raises(FileNotFoundError, match="memory://bucket/none: no safetensors files"):
        quantize_checkpoint("memory://bucket/none", tmp_path / "x")


def test_faults_of_the_source(source, tmp_path, store):
    """Errors name the URL; nothing is published under a shard's name that failed."""
    name = sorted(p.name for p in source.glob("*.safetensors"))[1]
    state = load_file(source / name)
    key = next(k for k in state if "proj" in k)
    state[key][1, 1] = float("nan")
    save_file(state, tmp_path / "bad", {"format": "pt"})
    store.pipe_file(f"/bucket/float/{name}", (tmp_path / "bad").read_bytes())
    with pytest.raises(ValueError, match=rf"memory://bucket/float/{name}: {key}: ") as error:
        quantize_checkpoint(SOURCE, OUT)
    assert "/tmp" not in str(error.value).replace("memory://", "")
    assert not any(n.startswith("model-00002") for n in there(OUT))
    assert "config.json" not in there(OUT)
    store.rm_file(f"/bucket/float/{name}")
    with pytest.raises(
        FileNotFoundError, match=rf"memory://bucket/float/{name}: named in model.safetensors.index.json"
    ):
        quantize_checkpoint(SOURCE, OUT)


def test_failing_requests(source, tmp_path, monkeypatch):
    """Every third read and every second write fail."""
    quantize_checkpoint(source, tmp_path / "out")
    count = dict.fromkeys(("cat_file", "put_file"), 0)
    for method, every in (("cat_file", 3), ("put_file", 2)):
        original = getattr(MemoryFileSystem, method)

        def faulty(system, *args, method=method, every=every, original=original, **kwargs):
            count[method] += 1
            if count[method] % every == 0:
                raise TimeoutError
            return original(system, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, method, faulty)
    quantize_checkpoint(SOURCE, OUT)
    assert min(count.values()) > 6
    monkeypatch.undo()
    assert there(OUT) == tree(tmp_path / "out")


def test_two_at_once(source, store, monkeypatch):
    """Of two conversions that begin at the same moment, the one whose progress file comes second is refused."""
    original = remote.RemoteFolder.create

    def create(self, file, data):
        store.pipe_file("/bucket/out/qins-progress.json", json.dumps({"fingerprint": "other"}).encode())
        return original(self, file, data)

    monkeypatch.setattr(remote.RemoteFolder, "create", create)
    with pytest.raises(FileExistsError, match="another source or with other settings"):
        quantize_checkpoint(SOURCE, OUT)


def test_torch_files_in_another_process(tmp_path):
    """A pickled checkpoint of torch files has no tensors, and opens the files when it loads one."""
    import pickle

    from qins.files import open_checkpoint

    model = make("llama")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    opened = open_checkpoint(tmp_path)
    data = pickle.dumps(opened)
    assert len(data) < 20_000
    again = pickle.loads(data)
    name = "model.norm.weight"
    assert torch.equal(again.load(name), opened.load(name))
