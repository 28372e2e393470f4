"""Files that restore the original of a converted checkpoint, bit for bit: `exact-*.safetensors` beside the codes.

Each belongs to one file of the original. It holds the residuals of the layers that were converted with this file, and
in its metadata, as JSON, the original's header and checksum and where each tensor's bits are. Running the model needs
none of it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..codec import RESTORABLE, EncodedArray, residual
from ..system import atomically, naming_file
from .reading import Checkpoint, checksum, sha256
from .shards import ShardWriter, Target

PREFIX = "exact-"
METADATA = "qins_exact"
VERSION = 1
_PARTS = ".parts"  # follows the name of a file while its residuals are collected
RAW = "#raw"  # follows the name of a tensor that is stored whole
_REWRITTEN = ("config.json", "README.md", "model.safetensors.index.json")
_MOST = 100 << 20  # bytes of a stored header or file: as many as a header of safetensors may have


def exact_name(file: str) -> str:
    """Return the name of the file that restores this file of the original."""
    return f"{PREFIX}{file}" if file.endswith(".safetensors") else f"{PREFIX}{file}.safetensors"


def packed_text(data: bytes) -> str:
    """Return bytes as text, compressed."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpacked_text(text: str, name: str) -> bytes:
    """Return the bytes that `packed_text` packed; `name`: of the file that they belong to, for the error."""
    try:
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(base64.b64decode(text, validate=True), _MOST)
        if not unpacking.eof:
            raise ValueError("truncated" if len(data) < _MOST else f"more than {_MOST:,} bytes")
        return data
    except (ValueError, TypeError, zlib.error) as e:
        raise ValueError(f"{name}: its stored bytes are damaged: {e}") from None


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bits, which unlike its values can be compared and written without knowing the dtype."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def exact_bytes(directory: Path) -> int:
    """Return the bytes of the files that restore a directory's original; 0 if it has none."""
    return sum(p.stat().st_size for p in directory.glob(f"{PREFIX}*.safetensors")) if directory.is_dir() else 0


def check_restorable(checkpoint: Checkpoint, keys: list[str]) -> None:
    """Raise the ValueError that says why an original cannot be restored.

    Args:
        checkpoint: the original.
        keys: its tensors that become codes.

    """
    if checkpoint.format != "safetensors" or checkpoint.decodes:
        got = "weights in 8 or 4 bits" if checkpoint.decodes else f"{checkpoint.format} files"
        raise ValueError(f"{checkpoint.path}: exact restoring expects floats in safetensors files, got {got}")
    for key in keys:
        dtype = checkpoint.tensors[key].dtype
        if dtype not in RESTORABLE:
            raise ValueError(
                f"{checkpoint.where(key)}: {key}: exact restoring expects bfloat16 or float16, got {dtype}: the low 16 "
                "bits of float32 are noise, so codes and residuals would take about 27 of its 32 bits"
            )


class ExactRecorder:
    """Collects what restores one file of the original while it is converted, and writes it.

    Residuals are kept in a temporary file, since the sizes that a header needs are known only afterward.
    """

    def __init__(self, checkpoint: Checkpoint, file: Path, target: Path) -> None:
        self.checkpoint, self.file, self.target = checkpoint, file, target
        self._spool_path = target.with_name(target.name + _PARTS)
        self._spool_path.unlink(missing_ok=True)  # of a run that was killed, or a link
        self._spool: BinaryIO = self._spool_path.open("x+b")
        self._sizes: dict[str, int] = {}
        self._where: dict[str, dict[str, Any]] = {}
        self._raw: list[str] = []

    def close(self) -> None:
        """Delete the temporary file."""
        with suppress(OSError):  # a full disk may raise again
            self._spool.close()
        self._spool_path.unlink(missing_ok=True)

    def matrix(self, layer: str, index: int | None, weights: torch.Tensor, codes: EncodedArray) -> None:
        """Record what restores a layer's matrix, or one of a stack; codes and weights have the same shape."""
        data = residual(weights, codes)
        with naming_file(self._spool_path):
            self._spool.write(data.data)
        self._sizes[stream_name(layer, index)] = data.nbytes

    def layer(self, key: str, layer: str, transposed: bool, index: int | None = None, row: int = 0) -> None:
        """Record that a tensor of the original is a layer, or rows of one of its matrices from `row` on."""
        self._add(key, {"layer": layer, "transposed": transposed, "matrix": index, "row": row})

    def stored(self, key: str, name: str) -> None:
        """Record that a tensor is stored with the codes."""
        self._add(key, {"stored": name})

    def copy(self, key: str, other: str) -> None:
        """Record that a tensor has the bits of another tensor."""
        self._add(key, {"copy": other})

    def raw(self, key: str) -> None:
        """Record a tensor whole."""
        self._add(key, {"raw": key})
        self._raw.append(key)

    def _add(self, key: str, place: dict[str, Any]) -> None:
        self._where[key] = place | {"checksum": checksum(self.checkpoint.load(key))}

    def write(self, others: Mapping[str, Any]) -> None:
        """Write the file; `others`: what to store about the original's files that hold no weights."""
        about = {
            "version": VERSION, "file": self.file.name, "size": self.checkpoint.files[self.file],
            "sha256": self.checkpoint.sha256(self.file), "header": packed_text(self.checkpoint.header(self.file)),
            "tensors": self._where, "others": others,
        }  # fmt: skip
        raw = {k: self.checkpoint.tensors[k] for k in self._raw}
        targets = [Target(name, "uint8", (size,)) for name, size in self._sizes.items()]
        targets += [Target(f"{k}{RAW}", "uint8", (t.bytes,)) for k, t in raw.items()]
        with naming_file(self._spool_path):
            self._spool.flush()
        with (
            atomically(self.target) as temporary,
            ShardWriter(temporary, targets, {"format": "pt", METADATA: json.dumps(about)}) as writer,
        ):
            at = 0
            for name, size in self._sizes.items():
                part = np.memmap(self._spool_path, np.uint8, "c", at, (size,))
                writer.write(name, torch.from_numpy(part))
                at += size
            for key in raw:
                writer.write(f"{key}{RAW}", bits_of(self.checkpoint.load(key)))


def remove_parts(directory: Path) -> None:
    """Delete temporary files that an interrupted conversion has left beside complete ones."""
    for path in directory.glob(f"{PREFIX}*{_PARTS}"):
        path.unlink()


def stream_name(layer: str, index: int | None) -> str:
    """Return the name of the tensor that restores a layer's matrix, or one of a stack."""
    return layer if index is None else f"{layer}#{index}"


def is_kept(path: Path) -> bool:
    """Return whether the exact files keep a file that a conversion rewrites."""
    return path.name in _REWRITTEN and path.is_file() and path.stat().st_size <= _MOST


def _is_copy(path: Path, copy: Path) -> bool:
    return copy.is_file() and path.stat().st_size == copy.stat().st_size and sha256(path) == sha256(copy)


def others_of(directory: Path, copied: list[str], out: Path | None = None) -> dict[str, Any]:
    """Return what restores the files beside the weights: a checksum if a copy lies beside the codes, else its bytes.

    Args:
        directory: of the original.
        copied: names of its files that are copied, as far as `out` has the copies.
        out: directory of the codes; None if all will be copied.

    """
    others: dict[str, Any] = {}
    for path in sorted(directory.iterdir()):
        if path.name in copied and (out is None or _is_copy(path, out / path.name)):
            others[path.name] = {"sha256": sha256(path)}
        elif is_kept(path) or path.name in copied:
            with naming_file(path):
                others[path.name] = {"bytes": packed_text(path.read_bytes())}
    return others
