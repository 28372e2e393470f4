"""Packed codes (log6, log5, log4) as one number each, for NumPy arrays and torch tensors alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .fields import LOG_BITS, code_columns


def unpack(codes: Any, codec: str, concatenate: Callable[..., Any]) -> tuple[Any, Any]:
    """Return the signs and the levels of packed codes, in log8's form.

    Args:
        codes: (rows, bytes) of a wide integer type; qins_ext/packed.h has the layout.
        codec: "log6", "log5" or "log4".
        concatenate: np.concatenate or torch.cat.

    Returns:
        two of (rows, columns): 1 where the sign differs from the scale's, and the index 0 to 127 of the level in
        `_core.levels`.

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
