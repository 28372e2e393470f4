"""Restoring the original of a converted checkpoint from its codes and its `exact-*.safetensors`."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..codec import EncodedArray, restore
from ..system import atomically, locked, progress
from .exact import METADATA, PREFIX, RAW, VERSION, bits_of, exact_bytes, exact_name, stream_name, unpacked_text
from .layers import EncodedLayer, encoded_layers, load_layer
from .reading import Checkpoint, StoredTensor, checksum, open_checkpoint, sha256
from .shards import DTYPE_CODES


@dataclass
class _Exact:
    """What all `exact-*` files of a directory say."""

    codes: Checkpoint
    layers: dict[str, EncodedLayer]
    files: list[dict[str, Any]] = field(default_factory=list)  # the metadata of each
    where: dict[str, dict[str, Any]] = field(default_factory=dict)  # tensor of the original to where its bits are
    streams: dict[str, Checkpoint] = field(default_factory=dict)
    loaded: tuple[str, list[EncodedArray]] = ("", [])  # the layer that was loaded last
    matrix: tuple[str, torch.Tensor] | None = None  # the matrix that was restored last


def restore_checkpoint(source: str | Path, out: str | Path, *, show_progress: bool | None = None) -> dict[str, Any]:
    """Restore the original of a checkpoint that was converted with `exact`, bit for bit.

    Every file of weights is compared with its SHA-256 before it gets its name. An interrupted run resumes: complete
    files are kept. A few tensors are in memory at a time.

    Args:
        source: directory of the codes, with their `exact-*.safetensors`.
        out: directory to write; it must not exist, or must be empty or hold restored files.
        show_progress: None shows a progress bar on a terminal.

    Returns:
        dict: files, bytes, and changed: names of files beside the weights, such as a tokenizer's, that differ from the
            original's or are missing beside the codes, and so were not restored.

    Raises:
        FileNotFoundError: there is nothing to restore from, or a file is missing.
        FileExistsError: the output directory holds other files.
        ValueError: a file is damaged, or the codes are not those of the conversion.
        BlockingIOError: another process is restoring into the directory.

    """
    source, out = Path(source), Path(out)
    exact = _open_directory(source)
    if out.exists() and source.resolve() == out.resolve():
        raise FileExistsError(f"{out}: expected another directory than that of the codes")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a directory or nothing, got a file")
    out.mkdir(parents=True, exist_ok=True)
    names = {about["file"] for about in exact.files}
    others = {name: about for f in exact.files for name, about in f["others"].items()}
    lock = "qins.lock"
    clash = {lock, *(f"{n}.tmp" for n in (*names, *others))} & {*names, *others} or names & {*others}
    if clash:
        raise ValueError(f"{source}: expected files of other names than {min(clash)!r}")
    expected = {*names, *others, *(f"{n}.tmp" for n in (*names, *others)), lock}
    foreign = sorted(p.name for p in out.iterdir() if p.name not in expected)
    if foreign:
        raise FileExistsError(f"{out}: expected an empty directory or a restored model, got {foreign[0]} in it")
    total = sum(about["size"] for about in exact.files)
    needed = sum(about["size"] for about in exact.files if not (out / about["file"]).exists())
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(f"{out}: needs {needed:,} bytes, the disk has {free:,} free")
    with (
        locked(out / lock, f"{out}: another process is restoring into it"),
        progress("restoring", total, show_progress, in_bytes=True) as advance,
    ):
        for about in exact.files:
            target = out / about["file"]
            if target.exists():
                if sha256(target) != about["sha256"]:
                    raise FileExistsError(f"{target}: differs from the original; nothing is overwritten")
                advance(about["size"])
                continue
            _restore_file(exact, about, target, advance)
        changed = [name for name, about in others.items() if not _restore_other(source, out, name, about)]
    return {"files": sorted(names), "bytes": total, "changed": changed}


class RestoredCheckpoint(Checkpoint):
    """The original of a checkpoint of codes; its tensors are restored when they are loaded."""

    decodes = True

    def __init__(self, source: Path) -> None:
        exact = _open_directory(source)
        super().__init__(source, "safetensors", files=exact.codes.files, config=exact.codes.config)
        self._exact, self._lock = exact, threading.Lock()  # transformers loads tensors with several threads
        for about in exact.files:
            for key, dtype, shape, size in _tensors(about, _header(about)):
                self.tensors[key] = StoredTensor(key, dtype, shape, size, (about["file"], len(self.tensors)))
                self._where[key] = source / exact_name(about["file"])

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor, bit for bit as it was in the original."""
        if name not in self.tensors:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        t = self.tensors[name]
        with self._lock:
            bits = torch.cat([bits_of(part) for part in _parts(self._exact, name, t.dtype, t.shape, set())])
        expected, got = self._exact.where[name]["checksum"], checksum(bits)
        if got != expected or len(bits) != t.bytes:
            raise ValueError(
                f"{self.path}: {name}: expected checksum {expected}, restored {got}: the codes or their "
                f"{PREFIX}*.safetensors are damaged, or not those of one conversion"
            )
        dtype: torch.dtype = getattr(torch, t.dtype)
        if min(t.shape, default=0) < 0 or t.elements * dtype.itemsize != t.bytes:
            raise ValueError(f"{self.path}: {name}: expected {t.bytes} bytes for its shape, got {t.shape}")
        return bits.view(dtype).reshape(t.shape)


def exact_problems(codes: Checkpoint) -> list[str]:
    """Return sentences on what is wrong with the files that restore the original of a checkpoint of codes."""
    if not exact_bytes(codes.path):
        return []
    try:
        _open(codes)
    except (OSError, ValueError) as e:
        return [str(e)]
    return []


def _open_directory(source: Path) -> _Exact:
    if source.exists() and not source.is_dir():
        raise NotADirectoryError(f"{source}: expected the directory of a converted checkpoint, got a file")
    return _open(open_checkpoint(source))


def _open(codes: Checkpoint) -> _Exact:
    paths = sorted(codes.path.glob(f"{PREFIX}*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"{codes.path}: no {PREFIX}*.safetensors in it; `qins quantize --exact` writes what restores the original"
        )
    exact = _Exact(codes, {layer.name: layer for layer in encoded_layers(codes, [])})
    for path in paths:
        streams = open_checkpoint(path)
        about = _about(path, streams.metadata.get(METADATA, ""))
        if about["file"] in (f["file"] for f in exact.files):
            raise ValueError(f"{path}: restores {about['file']}, as another file does")
        exact.files.append(about)
        exact.where |= about["tensors"]
        exact.streams |= dict.fromkeys(streams.tensors, streams)
    return exact


def _about(path: Path, text: str) -> dict[str, Any]:
    """Return a file's metadata, checked as far as names and types go."""
    try:
        about = json.loads(text)
        _expect(isinstance(about, dict), "an object", about)
        _expect(about.get("version") == VERSION, f"version {VERSION}", about.get("version"))
        kinds = {"file": str, "size": int, "sha256": str, "header": str, "tensors": dict, "others": dict}
        for name, kind in kinds.items():
            _expect(type(about.get(name)) is kind, f"{name} of type {kind.__name__}", about.get(name))
        for name in (about["file"], *about["others"]):
            plain = Path(name).name == name and name not in ("", ".", "..") and not {*name} & {"\\", "\0"}
            _expect(plain, "the name of a file", name)
        for tensor, place in about["tensors"].items():
            _check_place(tensor, place)
        for name, other in about["others"].items():
            known = isinstance(other, dict) and len(other) == 1 and set(other) <= {"sha256", "bytes"}
            _expect(known and all(isinstance(v, str) for v in other.values()), f"a checksum or bytes of {name}", other)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as a file that restores an original: {e}") from None
    result: dict[str, Any] = about
    return result


def _expect(right: bool, what: str, got: Any) -> None:
    if not right:
        raise ValueError(f"expected {what}, got {repr(got)[:80]}")


def _check_place(tensor: str, place: Any) -> None:
    """Raise a ValueError unless this is the place of a tensor's bits."""
    _expect(isinstance(place, dict) and type(place.get("checksum")) is str, f"{tensor}: a checksum", place)
    kinds = {"layer", "stored", "copy", "raw"} & set(place)
    _expect(len(kinds) == 1 and all(type(place[k]) is str for k in kinds), f"{tensor}: one place", place)
    for name in ("matrix", "row"):
        number = place.get(name)
        right = number is None or (type(number) is int and number >= 0)
        _expect(right, f"{tensor}: {name} as a number", number)
    _expect(type(place.get("transposed", False)) is bool, f"{tensor}: transposed as true or false", place)


def _restore_file(exact: _Exact, about: dict[str, Any], target: Path, advance: Any) -> None:
    header = _header(about)
    h = hashlib.sha256()
    with atomically(target) as temporary, temporary.open("wb") as f:

        def write(data: Any) -> None:
            f.write(data)
            h.update(data)
            advance(len(data))

        write(header)
        for key, dtype, shape, size in _tensors(about, header):
            written = 0
            for part in _parts(exact, key, dtype, shape, set()):
                data = bits_of(part).numpy().data
                written += len(data)
                write(data)
            if written != size:
                raise ValueError(f"{target.name}: {key}: expected {size} bytes, restored {written}")
        f.flush()
        if h.hexdigest() != about["sha256"]:
            raise ValueError(
                f"{target.name}: expected SHA-256 {about['sha256']}, restored {h.hexdigest()}: the codes or their "
                f"{PREFIX}*.safetensors are damaged, or not those of one conversion"
            )


def _header(about: dict[str, Any]) -> bytes:
    return unpacked_text(about["header"], about["file"])


def _tensors(about: dict[str, Any], header: bytes) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Return name, dtype, shape and bytes of the tensors of a safetensors header, in the order of their data."""
    dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
    try:
        told = json.loads(header[8:])
        found = sorted((t["data_offsets"], k, t) for k, t in told.items() if k != "__metadata__")
        end = found[-1][0][1] if found else 0
        if len(header) + end != about["size"]:
            raise ValueError(f"expected {about['size']} bytes, got {len(header) + end}")
        return [
            (k, dtypes[t["dtype"]], tuple(map(int, t["shape"])), int(last) - int(first))
            for (first, last), k, t in found
        ]
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{about['file']}: its stored header is damaged: {e}") from None


def _parts(exact: _Exact, key: str, dtype: str, shape: tuple[int, ...], seen: set[str]) -> Iterator[torch.Tensor]:
    """Yield the bits of a tensor of the original, a matrix at a time."""
    where = exact.where.get(key)
    if where is None or key in seen:
        raise ValueError(f"{exact.codes.path}: {key}: no {PREFIX}*.safetensors tells where its bits are")
    if "copy" in where:
        yield from _parts(exact, where["copy"], dtype, shape, seen | {key})
    elif "raw" in where:
        yield _load(exact.streams, f"{key}{RAW}")
    elif "stored" in where:
        if where["stored"] not in exact.codes.tensors:
            raise ValueError(f"{exact.codes.path}: no tensor {where['stored']}, which restores {key}")
        yield exact.codes.load(where["stored"])
    else:
        yield from _matrices(exact, key, where, dtype, shape)


def _load(streams: dict[str, Checkpoint], name: str) -> torch.Tensor:
    if name not in streams:
        raise ValueError(f"no {PREFIX}*.safetensors holds {name!r}")
    return streams[name].load(name)


def _matrices(
    exact: _Exact, key: str, where: dict[str, Any], dtype: str, shape: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    layer = exact.layers.get(where["layer"])
    if layer is None:
        raise ValueError(f"{exact.codes.path}: no codes of {where['layer']}, which restore {key}")
    index, row = where.get("matrix"), where.get("row") or 0
    for i in [index] if index is not None or not layer.is_stack else range(layer.shape[0]):
        matrix = _matrix(exact, layer, i, dtype)
        if where.get("transposed"):
            yield matrix.T
        else:
            yield matrix[row : row + shape[-2]] if len(shape) >= 2 else matrix


def _matrix(exact: _Exact, layer: EncodedLayer, index: int | None, dtype: str) -> torch.Tensor:
    """Return one restored matrix; the last one is kept, since several tensors may be rows of it."""
    name = stream_name(layer.name, index)
    if exact.matrix is None or exact.matrix[0] != name:
        if exact.loaded[0] != layer.name:
            exact.loaded = (layer.name, load_layer(exact.codes, layer))
        codes, at = exact.loaded[1], index or 0
        if at >= len(codes):
            raise ValueError(f"{exact.codes.path}: {layer.name}: expected a matrix below {len(codes)}, got {index!r}")
        try:
            bits = restore(codes[at], _load(exact.streams, name).numpy(), dtype)
        except ValueError as e:
            raise ValueError(f"{exact.codes.path}: {name}: {e}") from None
        exact.matrix = (name, torch.from_numpy(bits.view(np.int16)))
    return exact.matrix[1]


def _restore_other(source: Path, out: Path, name: str, about: Any) -> bool:
    """Write a file that holds no weights; return False if the copy beside the codes is not the original's."""
    target, copy = out / name, source / name
    data = unpacked_text(about["bytes"], name) if "bytes" in about else None
    if data is None and not (copy.is_file() and sha256(copy) == about["sha256"]):
        return False
    if target.exists():
        expected = about["sha256"] if data is None else hashlib.sha256(data).hexdigest()
        if sha256(target) != expected:
            raise FileExistsError(f"{target}: differs from the original; nothing is overwritten")
        return True
    with atomically(target) as temporary:
        if data is None:
            shutil.copyfile(copy, temporary)
        else:
            temporary.write_bytes(data)
    return True
