"""Residuals: what restores bfloat16 and float16 weights from their codes, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _core
from ..system import get_num_threads
from .array import EncodedArray
from .dtypes import Array, as_matrix, element_dtype, matrix_shape

RESTORABLE = ("bfloat16", "float16")


def residual(weights: Any, e: EncodedArray) -> Array:
    """Return what `restore` needs besides the codes: about 3 bits a weight for bfloat16, 6 for float16, with log8.

    Args:
        weights: bfloat16 or float16 array (or CPU tensor) of e's shape: those that `e` encodes, or any others, which
            take more bytes.
        e: their codes, of any codec, calibrated or not.

    Returns:
        uint8 array; qins_ext/exact.h has its format.

    Raises:
        TypeError: the weights are of another dtype.
        ValueError: the weights are of another shape.

    """
    matrix, dtype, shape = as_matrix(weights)
    if dtype not in RESTORABLE:
        raise TypeError(f"weights: expected bfloat16 or float16, got {dtype}")
    if shape != e.shape:
        raise ValueError(f"weights: expected the codes' shape {e.shape}, got {shape}")
    rows, cols = matrix.shape
    stream = _core.exact_encode(
        e.codec, e.arrays, e.scalars, rows, cols, e.group_size or 0, np.require(matrix, requirements=["C", "A"]),
        dtype, get_num_threads(),
    )  # fmt: skip
    return np.frombuffer(stream, np.uint8)


def restore(e: EncodedArray, residual: Array, dtype: str) -> Array:
    """Return the weights that `residual` was made from, bit for bit.

    Args:
        e: the codes that the residual was made for.
        residual: as `residual` returned it.
        dtype: "bfloat16" or "float16", that of the weights.

    Returns:
        array of e's shape: float16, or the bits of bfloat16 as uint16.

    Raises:
        ValueError: the residual is damaged, or belongs to other codes or another dtype. Damaged bits may go unnoticed,
            so keep a checksum of the weights.

    """
    if dtype not in RESTORABLE:
        raise ValueError(f"dtype: expected bfloat16 or float16, got {dtype!r}")
    rows, cols = matrix_shape(e.shape)
    out = np.empty((rows, cols), element_dtype(dtype)[1])
    stream = np.ascontiguousarray(residual, np.uint8).reshape(-1)
    whole = _core.exact_decode(
        e.codec, e.arrays, e.scalars, rows, cols, e.group_size or 0, out, dtype, get_num_threads(), stream
    )
    if not whole:
        raise ValueError(f"residual: damaged, or not that of these codes in {dtype}")
    return out.reshape(e.shape)
