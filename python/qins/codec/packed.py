"""Unpacking of packed codes (log6, log5, log4), for NumPy arrays and torch tensors alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .fields import LOG_BITS, code_columns


def unpack(codes: Any, codec: str, concatenate: Callable[..., Any]) -> tuple[Any, Any]:
    """Return the signs and levels of packed codes.

    Args:
        codes: (rows, bytes), cast to an integer type of more than 8 bits; qins_ext/packed.h has the layout.
        codec: "log6", "log5" or "log4".
        concatenate: np.concatenate or torch.cat.

    Returns:
        two arrays or tensors, (rows, columns): 1 where the sign differs from the scale's, else 0; and the level's index
        in `_core.levels`, 0 to 127 as in log8.

    """
    bits, cols = LOG_BITS[codec], code_columns(codec, codes.shape[1])
    blocks = [codes[:, :0]]
    for begin in range(0, cols, 64):
        eighths, at, low, block = min(64, cols - begin) // 8, begin // 8 * bits, 0, 0
        for width in (4, bits - 4):
            size = eighths * width
            plane = codes[:, at : at + size]
            shifts = range(0, 8, width) if width else ()
            parts = [(plane >> shift & (1 << width) - 1) << low for shift in shifts]
            block = block + concatenate(parts, 1) if parts else block
            low, at = low + width, at + size
        blocks.append(block)
    q = concatenate(blocks, 1)
    sign = q >> (bits - 1)
    m = ((q & (1 << (bits - 1)) - 1) + sign) << (8 - bits)
    return sign, m - (m >> 7)
