"""Checkpoints in object stores and on other hosts, through fsspec: `s3://`, `gs://`, `hf://` and what else it knows."""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..system import naming_extras
from .reading import Checkpoint, open_checkpoint

T = TypeVar("T")

_ATTEMPTS = 7
_FIRST_WAIT = 0.25  # seconds after the first failure; doubled after each: 16 s in all
_REQUEST = 16 << 20  # bytes per request: a failure repeats no more than this
_AT_ONCE = 8  # requests
_AHEAD = 2  # requests beyond the part of a file that is in use
_EDGE = 1 << 20  # bytes at both ends of a file that `fingerprint` reads
_HEADER = 100 << 20  # bytes that a header of safetensors may have
_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Stores that show an object only once it is whole. Elsewhere a file is renamed when it is.
_WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf"}
# What another attempt cannot change.
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, ValueError,
            TypeError, NotImplementedError, ImportError)  # fmt: skip


def is_remote(path: str | Path) -> bool:
    """Return whether a path is a URL that fsspec opens."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(path)) is not None


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of an object store or of another host.

    Requests that fail are repeated with growing waits. Credentials are fsspec's own: environment variables and
    configuration files of the process's machine.

    Args:
        url: such as `s3://bucket/model`.

    """

    url: str

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        with naming_extras():
            from fsspec.core import url_to_fs

        system, root = url_to_fs(self.url)
        return system, str(root).rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the connection, which belongs to a process."""
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the URL."""
        self.__dict__.update(state)

    def name(self, file: str) -> str:
        """Return the URL of a file."""
        return f"{self.url.rstrip('/')}/{file}"

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each file and folder directly in this one; {} if there is no such folder."""

        def listed() -> list[dict[str, Any]]:
            self._system.invalidate_cache()
            found: list[dict[str, Any]] = self._system.ls(self._root, detail=True)
            return found

        try:
            found = self._repeated(listed, self.url)
        except FileNotFoundError:
            return {}
        named = {e["name"].rstrip("/").rpartition("/")[2]: e for e in found if e["name"].rstrip("/") != self._root}
        return {n: named[n] for n in sorted(named) if n}

    def read(self, file: str, begin: int, end: int) -> bytes:
        """Return a part of a file.

        Raises:
            OSError: it cannot be read, after several attempts, or is shorter.

        """

        def part() -> bytes:
            data: bytes = self._system.cat_file(self._at(file), start=begin, end=end) if end > begin else b""
            if len(data) != end - begin:
                raise OSError(f"expected {end - begin:,} bytes from {begin:,} on, got {len(data):,}")
            return data

        return self._repeated(part, self.name(file))

    def read_into(self, file: str, begin: int, memory: memoryview) -> None:
        """Fill memory with a part of a file, by several requests at once."""

        def fill(at: int) -> None:
            end = min(at + _REQUEST, len(memory))
            memory[at:end] = self.read(file, begin + at, begin + end)

        places = range(0, len(memory), _REQUEST)
        if len(places) == 1:
            fill(0)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(fill, places):
                pass

    def chunks(self, file: str, size: int) -> Iterator[bytes]:
        """Yield a whole file, part by part; several are requested ahead."""
        places = iter(range(0, size, _REQUEST))

        def part(at: int) -> bytes:
            return self.read(file, at, min(at + _REQUEST, size))

        with ThreadPoolExecutor(_AHEAD) as pool:
            coming = deque(pool.submit(part, at) for at in islice(places, _AHEAD))
            while coming:
                yield coming.popleft().result()
                coming.extend(pool.submit(part, at) for at in islice(places, 1))

    def put(self, path: Path, file: str) -> None:
        """Write a local file; it appears under its name only once it is whole.

        Raises:
            OSError: after several attempts.

        """
        size = path.stat().st_size
        protocol = self._system.protocol
        whole = not _WHOLE.isdisjoint((protocol,) if isinstance(protocol, str) else protocol)
        target = self._at(file)
        written = target if whole else f"{target}.{uuid.uuid4().hex}.tmp"

        def write() -> None:
            if not whole:
                self._system.makedirs(self._root, exist_ok=True)
            self._system.put_file(str(path), written)
            self._system.invalidate_cache()
            there = self._system.info(written)["size"]
            if there != size:
                raise OSError(f"expected {size:,} bytes after writing, got {there:,}")

        self._repeated(write, self.name(file))
        if not whole:
            self._repeated(partial(self._system.mv, written, target), self.name(file))

    def create(self, file: str, data: bytes) -> bool:
        """Write a small file unless there is one; return whether it was written.

        Stores without conditional writes may let two processes at once write it; the last one wins.
        """

        def exclusive() -> bool:
            try:
                self._system.pipe_file(self._at(file), data, mode="create")
            except FileExistsError:
                return False
            return True

        def plain() -> bool:
            self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(self._at(file), data)
            return True

        if file in self.entries():
            return False
        try:
            return self._repeated(exclusive, self.name(file))
        except (TypeError, NotImplementedError, ValueError):
            return self._repeated(plain, self.name(file))

    def delete(self, file: str) -> None:
        """Delete a file, if it is there."""

        def remove() -> None:
            try:
                self._system.rm_file(self._at(file))
            except FileNotFoundError:  # also of an attempt whose answer was lost
                return

        self._repeated(remove, self.name(file))

    @property
    def _system(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def _at(self, file: str) -> str:
        return f"{self._root}/{file}"

    @staticmethod
    def _repeated(request: Callable[[], T], what: str) -> T:
        for attempt in range(_ATTEMPTS):
            try:
                return request()
            except _LASTING:
                raise
            except Exception as e:  # each library has its own classes of errors of the network
                if attempt == _ATTEMPTS - 1:
                    raise ConnectionError(f"{what}: failed {_ATTEMPTS} times: {type(e).__name__}: {e}") from e
            time.sleep(_FIRST_WAIT * 2**attempt)
        raise AssertionError


@dataclass
class RemoteCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read from another host when they are loaded, each by its range of bytes.

    Its paths name files of the same sizes in a local directory, which have the headers and what `fingerprint` reads,
    and holes for the rest.

    Attributes:
        folder: where the files are.
        versions: what the store says of each file that changes when the file does.
        offsets: first byte of each tensor in its file.

    """

    mapped = False

    folder: RemoteFolder = field(kw_only=True)
    versions: dict[Path, str] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)

    def version(self, file: Path) -> str:
        """Return what changes when a file does."""
        return self.versions[file]

    def header(self, file: Path) -> bytes:
        """Return the header of a safetensors file, its length included."""
        return _header(self.folder, file.name, self.files[file])

    def sha256(self, file: Path) -> str:
        """Return the SHA-256 of a file in hexadecimal."""
        h = hashlib.sha256()
        for chunk in self.folder.chunks(file.name, self.files[file]):
            h.update(chunk)
        return h.hexdigest()

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor, read into memory.

        Raises:
            KeyError: there is no tensor of this name.
            OSError: it cannot be read, after several attempts.

        """
        if name not in self.tensors:
            raise KeyError(f"{self.folder.url}: no tensor {name!r}")
        about = self.tensors[name]
        flat = torch.empty(about.bytes, dtype=torch.uint8)
        if about.bytes:
            self.folder.read_into(self.where(name).name, self.offsets[name], flat.numpy().data)
        dtype: torch.dtype = getattr(torch, about.dtype)
        return flat.view(dtype).view(about.shape)

    def load_each(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors as `load` returns them, in the files' order."""
        wanted = set(names)
        for path in self.files:
            yield from ((n, self.load(n)) for n in self.tensors if n in wanted and self._where[n] == path)


def open_remote(folder: RemoteFolder, directory: Path, only: str = "") -> RemoteCheckpoint:
    """Open a checkpoint in safetensors files; only headers and small files are read.

    Args:
        folder: where it is.
        directory: an empty local directory, which gets the small files, and the weights' with holes.
        only: name of the one file to open; all of them if it is empty.

    Raises:
        FileNotFoundError: there is none, or a shard is missing.
        OSError, ValueError: as of `open_checkpoint`; the message names the URL.

    """
    entries = folder.entries()
    if only:
        entries = {n: e for n, e in entries.items() if n == only}
    if not any(n.endswith(".safetensors") for n in entries):
        raise FileNotFoundError(
            f"{folder.url}: no safetensors files there (weights in other formats are read from a disk: copy them first)"
        )
    sketch(folder, entries, directory)
    opened = open_checkpoint(directory / only)
    offsets: dict[str, int] = {}
    for path in opened.files:
        offsets |= tensor_offsets(opened.header(path))
    versions = {path: _version(entries[path.name]) for path in opened.files}
    return RemoteCheckpoint(
        opened.path, opened.format, opened.files, opened.tensors, opened.config, opened.metadata, opened._where,
        folder=folder, versions=versions, offsets=offsets,
    )  # fmt: skip


def tensor_offsets(header: bytes) -> dict[str, int]:
    """Return the offset of each tensor in a safetensors file with this header, which the library has validated."""
    return {k: len(header) + v["data_offsets"][0] for k, v in json.loads(header[8:]).items() if k != "__metadata__"}


def sketch(folder: RemoteFolder, entries: dict[str, dict[str, Any]], directory: Path) -> None:
    """Make local files of these entries: whole, or of weights with holes."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(lambda item: _sketch(folder, item[0], item[1], directory), entries.items()):
            pass


def _sketch(folder: RemoteFolder, name: str, entry: dict[str, Any], directory: Path) -> None:
    """Make the local file of an entry: whole, or if it has weights, with holes."""
    if entry.get("type") == "directory":
        (directory / name).mkdir()
        return
    size = int(entry["size"])
    with (directory / name).open("wb") as f:
        if name.endswith(".safetensors"):
            f.write(_header(folder, name, size))
            for begin in (0, max(0, size - _EDGE)):
                f.seek(begin)
                f.write(folder.read(name, begin, min(begin + _EDGE, size)))
            f.truncate(size)
        elif name.endswith(_WEIGHTS):
            f.truncate(size)
        else:
            f.writelines(folder.chunks(name, size))


def _header(folder: RemoteFolder, name: str, size: int) -> bytes:
    """Return the header of a safetensors file, or as many bytes as a damaged one may be asked for."""
    length = int.from_bytes(folder.read(name, 0, min(8, size)), "little")
    return b"".join(folder.chunks(name, min(8 + min(length, _HEADER), size)))


def _version(entry: dict[str, Any]) -> str:
    keys = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "mtime", "modified", "created")
    return next((str(entry[k]) for k in keys if entry.get(k)), "")
