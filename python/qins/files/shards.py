"""Writing safetensors files tensor by tensor."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .direct import DirectWriter
from .reading import checksum

DTYPE_CODES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "uint8": "U8", "int8": "I8",
    "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL",
}  # fmt: skip
# The order of tensors in safetensors files: by dtype, widest first, then by name.
_DTYPE_ORDER = ["U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL"]


@dataclass(frozen=True)
class Target:
    """A tensor of the new checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        size = {"64": 8, "32": 4, "16": 2}.get(self.dtype[-2:], 1)
        for s in self.shape:
            size *= s
        return size


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in any order, so that they need not all be in memory.

    The library's own writer takes a dictionary of all tensors of a file. The layout here equals the library's byte for
    byte (tests compare them), and the library reads the result back.
    """

    def __init__(self, path: Path, targets: list[Target], metadata: dict[str, str]) -> None:
        self.path = path
        ordered = sorted(targets, key=lambda t: (_DTYPE_ORDER.index(DTYPE_CODES[t.dtype]), t.name))
        header: dict[str, Any] = {"__metadata__": metadata}
        self.places: dict[str, tuple[int, Target]] = {}
        at = 0
        for t in ordered:
            header[t.name] = {
                "dtype": DTYPE_CODES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes],
            }  # fmt: skip
            self.places[t.name] = (at, t)
            at += t.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.file = DirectWriter(path)
        try:
            self.file.write(memoryview(len(text).to_bytes(8, "little") + text), 0)
            self.file.truncate(self.start + at)
        except OSError:
            with suppress(OSError):
                self.file.close()
            raise
        self.left = set(self.places)
        self.checksums: dict[str, str] = {}

    def write(self, name: str, tensor: torch.Tensor, part: int | None = None) -> None:
        """Write one tensor, or one slice along its first dimension; slices must come in order."""
        at, target = self.places[name]
        shape = target.shape if part is None else target.shape[1:]
        if tuple(tensor.shape) != shape or str(tensor.dtype)[6:] != target.dtype:
            raise ValueError(f"{name}: expected {target.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel():
            self.file.write(flat.view(torch.uint8).numpy().data, self.start + at + (part or 0) * tensor.nbytes)
        self.checksums[name] = checksum(flat, self.checksums[name] if part else None)
        if part is None or part == target.shape[0] - 1:
            self.left.discard(name)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            with suppress(OSError):  # a full disk may raise again
                self.file.close()

    def close(self) -> None:
        """Close the file; raise a ValueError if a tensor was not written."""
        self.file.close()
        if self.left:
            raise ValueError(f"{self.path}: not written: {', '.join(sorted(self.left)[:5])}")
