"""Checkpoints behind URLs: reading by ranges, writing, and requests that fail."""

from __future__ import annotations

import errno

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file

from qins.files import RemoteFolder, fingerprint, is_remote, open_checkpoint, open_remote
from qins.files import remote as module

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def store(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda s: None)
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem
    MemoryFileSystem.store.clear()


def put(name, data):
    MemoryFileSystem().pipe_file(f"/bucket/model/{name}", data)


FOLDER = RemoteFolder("memory://bucket/model")
TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4).bfloat16(), "b": torch.randn(5), "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5), "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn), "bool": torch.tensor([True, False]),
    "large": torch.randn(300, 1000),
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    save_file(TENSORS, local / "model.safetensors", {"format": "pt"})
    (local / "config.json").write_text('{"a": 1}')
    (local / "model.gguf").write_bytes(b"x" * 1000)
    for path in local.iterdir():
        put(path.name, path.read_bytes())
    put("sub/inner.txt", b"inner")
    return local


@pytest.mark.parametrize(("path", "expected"), [("s3://a/b", True), ("hf://a/b", True), ("a/b", False),
                                                ("/a", False), ("C:\\a", False), ("a:b", False)])  # fmt: skip
def test_what_is_remote(path, expected):
    assert is_remote(path) == expected


def test_as_local(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_REQUEST", 1000)
    (tmp_path / "sketch").mkdir()
    remote, local = open_remote(FOLDER, tmp_path / "sketch"), open_checkpoint(saved / "model.safetensors")
    assert {n: (t.dtype, t.shape, t.bytes) for n, t in remote.tensors.items()} == {
        n: (t.dtype, t.shape, t.bytes) for n, t in local.tensors.items()
    }
    assert remote.config == {"a": 1}
    for name, expected in TENSORS.items():
        for loaded in (remote.load(name), local.load(name)):
            assert (loaded.dtype, loaded.shape) == (expected.dtype, expected.shape)
            assert torch.equal(loaded.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
    assert [n for n, _ in remote.load_each(["b", "a"])] == [n for n in remote.tensors if n in "ab"]
    (there,), (here,) = remote.files, local.files
    assert (remote.sha256(there), remote.header(there)) == (local.sha256(here), local.header(here))
    assert fingerprint(remote.files) == fingerprint(local.files)
    assert sorted(p.name for p in (tmp_path / "sketch").iterdir()) == [
        "config.json", "model.gguf", "model.safetensors", "sub",
    ]  # fmt: skip


def test_the_middle_of_a_file_is_not_read(tmp_path):
    save_file({"large": torch.randn(1024, 1024)}, tmp_path / "model.safetensors")
    put("model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    (tmp_path / "sketch").mkdir()
    remote = open_remote(FOLDER, tmp_path / "sketch")
    assert (tmp_path / "sketch" / "model.safetensors").read_bytes()[2 << 20 : 3 << 20].strip(b"\0") == b""
    assert fingerprint(remote.files) == fingerprint([tmp_path / "model.safetensors"])


def test_a_change_is_seen(saved, tmp_path):
    versions = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        remote = open_remote(FOLDER, tmp_path / str(i))
        versions.append(remote.version(*remote.files))
        put("model.safetensors", (saved / "model.safetensors").read_bytes())
    assert versions[0] != versions[1]


def test_no_checkpoint(tmp_path):
    put("model.bin", b"x")
    with pytest.raises(FileNotFoundError, match="memory://bucket/model: no safetensors files there"):
        open_remote(FOLDER, tmp_path)
    with pytest.raises(FileNotFoundError):
        open_remote(RemoteFolder("memory://bucket/none"), tmp_path)


@pytest.mark.parametrize("damage", ["cut", "header", "short"])
def test_damaged(saved, tmp_path, damage):
    data = (saved / "model.safetensors").read_bytes()
    put("model.safetensors", {"cut": data[:-10], "header": b"\xff" * 8 + data[8:], "short": b"abc"}[damage])
    (tmp_path / "sketch").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_remote(FOLDER, tmp_path / "sketch")


class Faults:
    """Makes requests of one kind fail, or return too little."""

    def __init__(self, monkeypatch, method, times, error=None):
        self.left, original = times, getattr(MemoryFileSystem, method)

        def faulty(system, *args, **kwargs):
            if self.left:
                self.left -= 1
                if error is not None:
                    raise error
                return original(system, *args, **kwargs)[:-1]
            return original(system, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, method, faulty)


class OtherError(Exception):
    """As botocore's and aiohttp's, which are no OSErrors."""


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), TimeoutError(), OtherError("503"), None])
def test_reads_are_repeated(saved, tmp_path, monkeypatch, error):
    (tmp_path / "sketch").mkdir()
    faults = Faults(monkeypatch, "cat_file", 5, error)
    remote = open_remote(FOLDER, tmp_path / "sketch")
    faults.left = 5
    assert torch.equal(remote.load("large"), TENSORS["large"])
    assert faults.left == 0
    faults.left = 1000
    with pytest.raises(ConnectionError, match=r"memory://bucket/model/model\.safetensors: failed 7 times: .*"):
        remote.load("large")
    assert faults.left == 993


def test_what_lasts_is_not_repeated(saved, monkeypatch):
    faults = Faults(monkeypatch, "cat_file", 10, PermissionError("no"))
    with pytest.raises(PermissionError):
        FOLDER.read("config.json", 0, 1)
    assert faults.left == 9


def test_waits_grow(saved, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    Faults(monkeypatch, "cat_file", 6, TimeoutError())
    FOLDER.read("config.json", 0, 1)
    assert waits == [0.25, 0.5, 1, 2, 4, 8]


def test_writes(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    names = []
    original = MemoryFileSystem.put_file

    def put_file(self, lpath, rpath, **kwargs):
        names.append(rpath)
        if len(names) == 1:
            raise OSError("half")
        original(self, lpath, rpath, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    FOLDER.put(tmp_path / "file", "x.safetensors")
    assert MemoryFileSystem().cat_file("/bucket/model/x.safetensors") == b"content"
    assert [*FOLDER.entries()] == ["x.safetensors"]
    assert len(names) == 2
    assert all(n.endswith(".tmp") for n in names)  # renamed once it is whole
    assert FOLDER.create("once", b"1")
    assert not FOLDER.create("once", b"2")
    assert FOLDER.read("once", 0, 1) == b"1"
    FOLDER.delete("once")
    FOLDER.delete("once")
    assert [*FOLDER.entries()] == ["x.safetensors"]


def test_a_write_that_arrives_short_is_repeated(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    original, count = MemoryFileSystem.put_file, []

    def put_file(self, lpath, rpath, **kwargs):
        count.append(1)
        original(self, lpath, rpath, **kwargs)
        if len(count) == 1:
            self.pipe_file(rpath, b"cont")

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    FOLDER.put(tmp_path / "file", "x")
    assert MemoryFileSystem().cat_file("/bucket/model/x") == b"content"
    assert len(count) == 2
