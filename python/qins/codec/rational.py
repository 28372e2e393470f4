"""The prototype's second codec, z = sign/(1 + alpha |w|): deprecated, kept as a baseline. Use log8.

Quantized, it takes one byte per weight: the sign, and 7 bits for |z| over the range that occurs. The prototype (seed)
mapped z from [-1, 1] to 0..255 instead, which uses only a few codes where alpha |w| is far below 1. Such codes stay
readable.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .dtypes import is_torch
from .fields import check_alpha
from .rational_arrays import RationalArray, check_finite, codes_of, decode_array, project

Array = np.ndarray[Any, Any]

DEFAULT_TARGETS = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def warn_deprecated(what: str) -> None:
    """Warn the caller's caller and recommend log8."""
    warnings.warn(
        f"{what}: the rational codec is deprecated; log8 (qins.encode, qins.convert) is as small and more accurate",
        DeprecationWarning,
        stacklevel=3,
    )


def qins_encode(weight: Any, alpha: float = 1.0, quantize: bool = False) -> Any:
    """Encode weights as z = sign/(1 + alpha |w|); the sign of zero is +1.

    Args:
        weight: floating-point torch tensor or NumPy array of any shape.
        alpha: slope; larger values spread small weights further.
        quantize: one byte per weight instead of float32.

    Returns:
        float32 z of weight's shape; or, quantized, uint8 codes with their range of |z| in attributes z_min and z_max
        (a RationalTensor or a RationalArray).

    Raises:
        ValueError: a weight is NaN or infinite, or alpha is not a positive number.

    """
    warn_deprecated("qins_encode")
    alpha = check_alpha(alpha)
    if is_torch(weight):
        from .rational_tensors import encode_tensor  # torch is optional

        return encode_tensor(weight, alpha, quantize)
    array = np.asarray(weight)
    if array.dtype.kind != "f":
        raise TypeError(f"weight: expected a floating-point array, got {array.dtype}")
    if not quantize:
        check_finite("weight", array)
        return project(array, alpha, back=False)
    e = codes_of(array, alpha)
    codes = e.fields["w_encoded"].view(RationalArray)
    codes.z_min, codes.z_max = float(e.fields["z_min"]), float(e.fields["z_max"])
    return codes


def qins_decode(encoded: Any, alpha: float = 1.0, is_quantized: bool = False) -> Any:
    """Return float32 weights: sign (1 - |z|)/(alpha |z|).

    Args:
        encoded: a result of `qins_encode`, or the prototype's own quantized codes: plain uint8, whose z is
            code/255 * 2 - 1.
        alpha: as for `qins_encode`.
        is_quantized: whether `encoded` holds codes instead of z.

    Raises:
        TypeError, ValueError: `encoded` does not match is_quantized, or holds a z of 0 or outside [-1, 1].

    """
    warn_deprecated("qins_decode")
    alpha = check_alpha(alpha)
    if is_torch(encoded):
        from .rational_tensors import decode_tensor  # torch is optional

        return decode_tensor(encoded, alpha, is_quantized)
    array = np.asarray(encoded)
    return decode_array(array, getattr(encoded, "z_min", None), getattr(encoded, "z_max", None), alpha, is_quantized)
