"""Element types, and weights in the matrix form that the core expects."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


_FLOATS = ("float32", "float16", "float64")


def is_torch(x: Any) -> bool:
    """Return whether x is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of an array of this shape as a matrix; the last dimension is the columns."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def element_dtype(dtype: Any) -> tuple[str, np.dtype[Any]]:
    """Return the core's name of a floating-point dtype, and the NumPy dtype to pass: uint16 for bfloat16."""
    try:
        resolved = np.dtype(dtype)
    except TypeError:
        if dtype == "bfloat16":
            return "bfloat16", np.dtype(np.uint16)
        raise TypeError(f"dtype: expected float32, float16, float64 or bfloat16, got {dtype!r}") from None
    if resolved.name == "bfloat16":
        return "bfloat16", np.dtype(np.uint16)
    if resolved.name in _FLOATS:
        return resolved.name, resolved.newbyteorder("=")
    raise TypeError(f"dtype: expected float32, float16, float64 or bfloat16, got {resolved.name}")


def as_matrix(weights: Any) -> tuple[Array, str, tuple[int, ...]]:
    """View weights (array or torch tensor) as a 2-D array; also return its element type's name and original shape."""
    if is_torch(weights):
        from .tensors import tensor_to_array

        array, name = tensor_to_array(weights)
    else:
        array = np.asarray(weights)
        if array.dtype.name != "bfloat16" and array.dtype.name not in _FLOATS:
            raise TypeError(f"weights: expected float32, float16, float64 or bfloat16, got {array.dtype.name}")
        name, native = element_dtype(array.dtype)
        if name == "bfloat16":
            array = array.view(native)
        elif not array.dtype.isnative:
            array = array.astype(native)
    shape = array.shape
    return array.reshape(matrix_shape(shape)), name, shape


def as_float32(weights: Any) -> Array:
    """Return weights (array or CPU tensor) as a C-contiguous float32 array, which may share their memory."""
    matrix, name, shape = as_matrix(weights)
    if name == "bfloat16":
        matrix = (matrix.astype(np.uint32) << 16).view(np.float32)
    return np.require(matrix.reshape(shape), np.float32, ["C", "A"])
