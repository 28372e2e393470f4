"""Quantized weights in 8 or fewer bits with scales, dequantized one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .reading import Checkpoint, StoredTensor

_PART = 1 << 22  # weights dequantized at a time
_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
_ZEROS = ("int8", "int32", "float32", "bfloat16", "float16", "float8_e4m3fn")
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = torch.cat([_FP4, -_FP4])


@dataclass(frozen=True)
class ScaledWeight:
    """How a checkpoint stores a weight: `(values - zero_points) * scales`, with one scale and zero point per block.

    Attributes:
        values, scales: keys of the checkpoint's tensors.
        zero_points: likewise; None for symmetric quantization.
        shape: rows and columns of the matrix, or of each matrix of a stack.
        block: rows and columns that share a scale; blocks at the edges may be partial.
        bits: width of packed integers, lowest bits first; 0 for values that are not packed.
        is_fp4: whether the 4 bits are a number in E2M1.
        packed_zeros: whether the zero points are packed too, along the rows.
        matrices: number of matrices in a stack; 0 for a single matrix. The model has those of a stack transposed.
        dtype: dtype of the dequantized floats, in which FP4 is exact.

    """

    values: str
    scales: str
    zero_points: str | None
    shape: tuple[int, int]
    block: tuple[int, int]
    bits: int = 0
    is_fp4: bool = False
    packed_zeros: bool = False
    matrices: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks, down and across."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """The shape in the model."""
        return (self.matrices, *self.shape[::-1]) if self.matrices else self.shape


@dataclass
class ScaledCheckpoint(Checkpoint):
    """A checkpoint of quantized weights, which are dequantized when they are loaded.

    Attributes:
        source: the checkpoint with the stored tensors.
        weights: storage of each quantized weight, by name.
        source_format: name of the format for reports.

    """

    decodes = True

    source: Checkpoint = field(kw_only=True)
    weights: dict[str, ScaledWeight] = field(default_factory=dict)
    source_format: str = ""

    def version(self, file: Path) -> str:
        """Return what changes when a file does."""
        return self.source.version(file)

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor, dequantized.

        Raises:
            KeyError: there is no tensor of this name.
            ValueError: a scale is not finite.

        """
        about = self.weights.get(name)
        if about is None:
            return self.source.load(name)
        if not about.matrices:
            return next(self._decoded(name, about))
        stack = torch.empty(about.decoded_shape, dtype=about.dtype)
        for whole, matrix in zip(stack, self._decoded(name, about), strict=True):
            whole.copy_(matrix)
        return stack

    def load_matrices(self, name: str) -> Iterator[torch.Tensor]:
        """Return an iterator over the matrices of a stack."""
        about = self.weights.get(name)
        return iter(self.source.load(name)) if about is None else self._decoded(name, about)

    def _decoded(self, name: str, about: ScaledWeight) -> Iterator[torch.Tensor]:
        values, scales = self.source.load(about.values), self._scales(name, about)
        zeros = self._zero_points(about)
        if not about.matrices:
            yield _decode(about, values, scales.reshape(about.blocks), zeros)
            return
        for v, s in zip(values, scales, strict=True):
            yield _decode(about, v.reshape(about.shape[0], -1), s, None).T

    def _scales(self, name: str, about: ScaledWeight) -> torch.Tensor:
        stored = self.source.load(about.scales)
        if stored.dtype == torch.uint8:  # float32 exponents: 255 becomes infinity, as in float32, but 0 is 2**-127
            scales = torch.where(stored == 0, 1 << 22, stored.int() << 23).view(torch.float32)
        else:
            scales = stored.float()
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"{self.where(name)}: {about.scales}: expected finite scales, got NaN or infinity")
        return scales

    def _zero_points(self, about: ScaledWeight) -> torch.Tensor | None:
        if about.zero_points is None:
            return None
        stored = self.source.load(about.zero_points)
        rows, columns = about.blocks
        if about.packed_zeros:
            return _unpack(stored.T, about.bits, rows).T.sub(1 << (about.bits - 1))
        return stored.float().reshape(rows, columns)


def _unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Unpack unsigned integers from rows of bytes or 32-bit words; return them as floats."""
    data = packed.reshape(-1).view(torch.uint8).reshape(len(packed), -1)
    parts = [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).reshape(len(data), -1)[:, :columns].float()


def _decode(
    about: ScaledWeight, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    rows, columns = about.shape
    floats = torch.empty(rows, columns, dtype=about.dtype)
    step = max(1, _PART // max(columns, 1))
    for begin in range(0, rows, step):
        part = values[begin : begin + step]
        if about.is_fp4:
            numbers = _E2M1[_unpack(part, 4, columns).int()]
        elif about.bits:
            numbers = _unpack(part, about.bits, columns).sub_(1 << (about.bits - 1))
        else:
            numbers = part.float()
        block = torch.arange(begin, begin + len(part)) // about.block[0]
        if zeros is not None:
            numbers = numbers - _across(zeros[block], about)
        floats[begin : begin + step] = numbers * _across(scales[block], about)
    return floats


def _across(per_block: torch.Tensor, about: ScaledWeight) -> torch.Tensor:
    if per_block.shape[1] == 1:
        return per_block
    return per_block.repeat_interleave(about.block[1], dim=1)[:, : about.shape[1]]


def check_scales(checkpoint: Checkpoint, about: ScaledWeight, dtype: str | None = None) -> None:
    """Check a weight's scales and zero points.

    Raises:
        ValueError: they are missing, or their dtype or shape does not fit the weight.

    """
    blocks = (about.matrices, *about.blocks) if about.matrices else about.blocks
    allowed = (dtype,) if dtype else _SCALES
    _check(checkpoint, about.values, about.scales, "scales", blocks, allowed)
    if about.zero_points:
        rows = -(-blocks[0] * about.bits // 32) if about.packed_zeros else blocks[0]
        zeros = ("int32",) if about.packed_zeros else _ZEROS
        _check(checkpoint, about.values, about.zero_points, "zero points", (rows, blocks[1]), zeros)


def _check(
    checkpoint: Checkpoint, weight: str, key: str, what: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    t = checkpoint.tensors.get(key)
    if t is None:
        raise ValueError(f"{weight}: expected its {what} in {key}, got none")
    if t.dtype not in dtypes:
        raise ValueError(f"{key}: expected {' or '.join(dtypes)}, got {t.dtype}")
    # per-tensor and per-row scales may lack the dimensions of size one
    short = {shape, shape[:1], ()} if shape == (1, 1) else {shape, shape[:1]} if shape[1:] == (1,) else {shape}
    if t.shape not in short:
        raise ValueError(f"{key}: expected shape {shape} for {weight}, got {t.shape}")


def is_block(size: Any) -> bool:
    """Return whether this is a valid block size: a list of two positive integers."""
    return isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)


def matrix_shape(t: StoredTensor) -> tuple[int, int]:
    """Return the rows and columns of a stored matrix.

    Raises:
        ValueError: the tensor is not a matrix, or is empty.

    """
    if len(t.shape) != 2 or not t.elements:
        raise ValueError(f"{t.name}: expected a matrix, got shape {t.shape}")
    return t.shape[0], t.shape[1]
