"""torch tensors as NumPy arrays, and torch's threads for the core. Imported only where torch is in use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..system import get_num_threads
from .fields import ARRAYS, SCALARS, array_names, code_columns, field_names, is_packed
from .packed import unpack

try:
    import torch
except ImportError as e:  # pragma: no cover - depends on the environment
    raise ImportError("this part of qins needs torch: pip install 'qins[torch]'") from e

# the core's numbers of element types
DTYPE_NUMBER = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}
Array = np.ndarray[Any, Any]
Tensor = torch.Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """Return the core's name of an element type."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise TypeError(f"dtype: expected one of {', '.join(_NAMES.values())}, got {dtype}") from None


def tensor_to_array(t: torch.Tensor) -> tuple[Array, str]:
    """View a floating-point tensor as an array (uint16 for bfloat16); also return the element type's name.

    A tensor that is not on the CPU is copied.
    """
    if t.dtype not in _NAMES:
        raise TypeError(f"weights: expected one of {', '.join(_NAMES.values())}, got {t.dtype}")
    name = _NAMES[t.dtype]
    t = t.detach().cpu()
    return (t.view(torch.uint16) if name == "bfloat16" else t).numpy(), name


def _share_torch_threads() -> None:
    """Run the core's parallel work on the OpenMP threads that torch already has.

    libgomp's threads spin for a while after each operation, so a second pool would fight them for the cores. Where
    torch brings another runtime, the core keeps its own pool.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            address = ctypes.cast(
                ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel, ctypes.c_void_p
            ).value
        except (OSError, AttributeError):
            continue
        if address:
            _core.set_fork_join(address)
            return


_share_torch_threads()


def _split(
    codec: str, group_size: int | None, fields: Sequence[Tensor]
) -> tuple[tuple[np.ndarray, ...], tuple[float, ...]]:
    n = len(array_names(codec, group_size))
    arrays = tuple(f.detach().contiguous().numpy() for f in fields[:n])
    return arrays, tuple(float(f) for f in fields[n:])


class Blocks:
    """Dequantizes blocks of one CPU weight matrix."""

    def __init__(self, codec: str, group_size: int | None, fields: Sequence[Tensor]) -> None:
        self.codec, self.group_size = codec, group_size
        self.arrays, self.scalars = _split(codec, group_size, fields)
        self.rows, width = self.arrays[0].shape
        self.cols = code_columns(codec, width)

    def decode(self, out: Tensor, row: int, col: int) -> Tensor:
        """Dequantize the block of out's shape at (row, col)."""
        array = (out.view(torch.uint16) if out.dtype == torch.bfloat16 else out).numpy()
        _core.decode(
            self.codec, self.arrays, self.scalars, self.rows, self.cols, self.group_size or 0, array,
            dtype_name(out.dtype), row, col, get_num_threads(),
        )  # fmt: skip
        return out

    def tiles(self, dtype: torch.dtype, scratch: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (rows, columns, dequantized tile) over the whole matrix; each tile is in `scratch`."""
        room = scratch.view(dtype)
        width = max(1, min(self.cols, room.numel()))
        height = max(1, room.numel() // width)
        for row in range(0, self.rows, height):
            for col in range(0, self.cols, width):
                shape = min(height, self.rows - row), min(width, self.cols - col)
                tile = room[: shape[0] * shape[1]].view(shape)
                yield slice(row, row + shape[0]), slice(col, col + shape[1]), self.decode(tile, row, col)


def decode_on_device(codec: str, group_size: int | None, fields: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantize with torch's own operations, on the device of the codes."""
    names = field_names(codec, group_size)
    f = dict(zip(names, fields, strict=True))
    scalars = tuple(float(f[n]) for n in SCALARS[codec])
    codes = fields[0]
    table = torch.frombuffer(bytearray(_core.levels(codec, scalars)), dtype=torch.float32).to(codes.device)
    if codec == "rational":
        values, negative = table[(codes & 0x7F).long()], codes >= 0x80
    elif is_packed(codec):
        values, negative = _packed_values(codec, group_size or 0, f, table)
    elif codec == "log8":
        scale = f["scale"][:, None]
        if group_size:
            multiplier = (f["group_scale"].float() + 1) / 256
            scale = (scale * multiplier).repeat_interleave(group_size, 1)[:, : codes.shape[1]]
        values, negative = table[(codes & 0x7F).long()] * scale, codes >= 0x80
    else:
        values = table[codes.long()]
        if codec == "golden":
            negative = f["sign"] < 0
        else:
            bit = torch.arange(8, device=codes.device, dtype=torch.uint8)
            negative = (f["sign_bits"].unsqueeze(-1) >> bit & 1).flatten(1)[:, : codes.shape[1]].bool()
    return torch.where(negative, -values, values).to(dtype)


def _packed_values(codec: str, group_size: int, f: Mapping[str, Tensor], table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the magnitudes of log6, log5 or log4, and where they are negative."""
    sign, m = unpack(f[ARRAYS[codec][0]].int(), codec, torch.cat)
    group = f["group_scale"].int()
    scale = f["scale"][:, None] * (((group & 127) + 1).float() / 128)
    of_columns = torch.arange(m.shape[1], device=m.device) // group_size
    return table[m.long()] * scale[:, of_columns], (sign == 1) ^ (group >= 128)[:, of_columns]


def decode_fields(codec: str, fields: Mapping[str, Tensor], group_size: int | None, dtype: torch.dtype) -> Tensor:
    """Return the dequantized weights, of any shape, on the device of the codes."""
    names = field_names(codec, group_size)
    codes = fields[names[0]]
    rows = codes.numel() // codes.shape[-1] if codes.dim() and codes.shape[-1] else int(codes.numel() > 0)
    flat = []
    for n in names:
        f = fields[n]
        flat.append(f.reshape(-1) if n == "scale" else f if n in SCALARS[codec] else _rows(f, rows))
    shape = (*codes.shape[:-1], code_columns(codec, codes.shape[-1])) if codes.dim() else codes.shape
    if codes.device.type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if codes.device.type != "cpu":
        return decode_on_device(codec, group_size, flat, dtype).reshape(shape)
    out = torch.empty(shape, dtype=dtype)
    Blocks(codec, group_size, [f.contiguous() for f in flat]).decode(_rows(out, rows), 0, 0)
    return out


def _rows(t: Tensor, rows: int) -> Tensor:
    return t.reshape(rows, t.shape[-1] if t.dim() else 1)
