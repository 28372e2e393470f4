"""Restoring the original of a converted checkpoint from its codes and its `exact-*.safetensors`."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..codec import EncodedArray, restore
from ..system import atomically, locked, progress
from .exact import METADATA, PREFIX, RAW, VERSION, bits_of, exact_name, sha256, stream_name, unpacked_text
from .layers import EncodedLayer, encoded_layers, load_layer
from .reading import Checkpoint, StoredTensor, open_checkpoint
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
    exact = _open(source)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a directory or nothing, got a file")
    out.mkdir(parents=True, exist_ok=True)
    names = {about["file"] for about in exact.files}
    others = {name: about for f in exact.files for name, about in f["others"].items()}
    lock = "qins.lock"
    expected = {*names, *others, *(f"{n}.tmp" for n in (*names, *others)), lock}
    foreign = sorted(p.name for p in out.iterdir() if p.name not in expected)
    if foreign:
        raise FileExistsError(f"{out}: expected an empty directory or a restored model, got {foreign[0]} in it")
    total = sum(about["size"] for about in exact.files)
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
        exact = _open(source)
        super().__init__(source, "safetensors", files=exact.codes.files, config=exact.codes.config)
        self._exact, self._lock = exact, threading.Lock()  # transformers loads tensors with several threads
        for about in exact.files:
            for key, dtype, shape, size in _tensors(
                unpacked_text(about["header"], about["file"]), about, about["file"]
            ):
                self.tensors[key] = StoredTensor(key, dtype, shape, size, (about["file"], len(self.tensors)))
                self._where[key] = source / exact_name(about["file"])

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor, bit for bit as it was in the original."""
        if name not in self.tensors:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        t = self.tensors[name]
        with self._lock:
            bits = torch.cat([bits_of(part) for part in _parts(self._exact, name, t.dtype, t.shape, set())])
        if len(bits) != t.bytes:
            raise ValueError(f"{self.path}: {name}: expected {t.bytes} bytes, restored {len(bits)}")
        restored: torch.Tensor = bits.view(getattr(torch, t.dtype)).reshape(t.shape)
        return restored


def _open(source: Path) -> _Exact:
    codes = open_checkpoint(source)
    paths = sorted(source.glob(f"{PREFIX}*.safetensors")) if source.is_dir() else []
    if not paths:
        raise FileNotFoundError(
            f"{source}: no {PREFIX}*.safetensors in it; `qins quantize --exact` writes what restores the original"
        )
    problems: list[str] = []
    exact = _Exact(codes, {layer.name: layer for layer in encoded_layers(codes, problems)})
    if problems:
        raise ValueError(f"{source}: {problems[0]}")
    for path in paths:
        streams = open_checkpoint(path)
        about = _about(path, streams.metadata.get(METADATA, ""))
        exact.files.append(about)
        exact.where |= about["tensors"]
        exact.streams |= dict.fromkeys(streams.tensors, streams)
    return exact


def _about(path: Path, text: str) -> dict[str, Any]:
    """Return a file's metadata, checked as far as names and types go."""
    try:
        about = json.loads(text)
        if about["version"] != VERSION:
            raise ValueError(f"version {about['version']}, this qins reads {VERSION}")
        for name in (about["file"], *about["others"]):
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"expected the name of a file, got {name!r}")
        about["size"] = int(about["size"])
        for tensor, where in about["tensors"].items():
            if len({"layer", "stored", "copy", "raw"} & set(where)) != 1:
                raise ValueError(f"{tensor}: expected one place, got {where}")
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path}: not readable as a file that restores an original: {e!r}") from None
    result: dict[str, Any] = about
    return result


def _restore_file(exact: _Exact, about: dict[str, Any], target: Path, advance: Any) -> None:
    header = unpacked_text(about["header"], target.name)
    h = hashlib.sha256()
    with atomically(target) as temporary, temporary.open("wb") as f:

        def write(data: Any) -> None:
            f.write(data)
            h.update(data)
            advance(len(data))

        write(header)
        for key, dtype, shape, size in _tensors(header, about, target.name):
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


def _tensors(header: bytes, about: dict[str, Any], name: str) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Return name, dtype, shape and bytes of the tensors of a safetensors header, in the order of their data."""
    dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
    try:
        told = json.loads(header[8:])
        found = sorted((t["data_offsets"], k, t) for k, t in told.items() if k != "__metadata__")
        end = found[-1][0][1] if found else 0
        if len(header) + end != about["size"]:
            raise ValueError(f"expected {about['size']} bytes, got {len(header) + end}")
        return [
            (k, dtypes.get(t["dtype"], t["dtype"]), tuple(t["shape"]), int(last) - int(first))
            for (first, last), k, t in found
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{name}: its stored header is damaged: {e}") from None


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
    index, row = where.get("matrix"), where.get("row", 0)
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
        if not isinstance(at, int) or not 0 <= at < len(codes):
            raise ValueError(f"{exact.codes.path}: {layer.name}: expected a matrix below {len(codes)}, got {index!r}")
        try:
            bits = restore(codes[at], _load(exact.streams, name).numpy(), dtype)
        except ValueError as e:
            raise ValueError(f"{exact.codes.path}: {name}: {e}") from None
        exact.matrix = (name, torch.from_numpy(bits.view(np.int16)))
    return exact.matrix[1]


def _restore_other(source: Path, out: Path, name: str, about: Any) -> bool:
    """Write a file that holds no weights; return False if the copy beside the codes is not the original's."""
    target = out / name
    if "bytes" in about:
        data = unpacked_text(about["bytes"], name)
    elif (source / name).is_file() and sha256(source / name) == about["sha256"]:
        data = (source / name).read_bytes()
    else:
        return False
    if target.exists() and target.read_bytes() != data:
        raise FileExistsError(f"{target}: differs from the original; nothing is overwritten")
    with atomically(target) as temporary:
        temporary.write_bytes(data)
    return True
