"""The seed's second codec, z = sign/(1 + alpha |w|): deprecated, kept as a baseline. Use log8.

Quantised, it takes one byte a weight: the sign, and 7 bits for |z| over the range that occurs. The seed mapped z from
[-1, 1] to 0..255 instead, which leaves a handful of codes where alpha |w| is far below 1; such codes stay readable.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from . import _core
from ._threads import get_num_threads
from .array import EncodedArray, check_alpha, encode, is_torch

Array = np.ndarray[Any, Any]

DEFAULT_TARGETS = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_TORCH_NAMES = ("QINSWeightLinear", "RationalTensor", "convert_linear_to_qins", "verify_qins_layer")


def warn_deprecated(what: str) -> None:
    """Point the caller's caller to log8."""
    warnings.warn(
        f"{what}: the rational codec is deprecated; log8 (qins.encode, qins.convert) is as small and more accurate",
        DeprecationWarning,
        stacklevel=3,
    )


class RationalArray(np.ndarray[Any, Any]):
    """Codes of z, uint8, with the range of |z| that they were quantised over; views and copies keep it.

    Attributes:
        z_min, z_max: ends of the range of |z|: level m stands for |z| = z_max - m/127 (z_max - z_min).

    """

    z_min: float | None
    z_max: float | None

    def __array_finalize__(self, obj: Any) -> None:
        """Take the range over from the array that this one is made of."""
        self.z_min = getattr(obj, "z_min", None)
        self.z_max = getattr(obj, "z_max", None)

    def __reduce__(self) -> Any:
        """As ndarray's, with the range."""
        make, args, state = tuple(super().__reduce__())
        return make, args, (state, self.z_min, self.z_max)

    def __setstate__(self, state: Any) -> None:
        """Undo `__reduce__`."""
        array, self.z_min, self.z_max = state
        super().__setstate__(array)


def project(values: Any, alpha: float, back: bool) -> Array:
    """Return z of weights, or (back) weights of z: float32 of the same shape."""
    array = np.ascontiguousarray(values, np.float32)
    out = np.empty_like(array)
    _core.rational(array.reshape(-1), alpha, back, out.reshape(-1), get_num_threads())
    result: Array = out.reshape(np.shape(values))
    return result


def quantise(weights: Any, alpha: float) -> EncodedArray:
    """Return the codes of weights: field w_encoded and its range."""
    return encode(weights, "rational", alpha=alpha)


def check_finite(name: str, array: Array) -> None:
    """Raise the ValueError that counts NaN and infinities."""
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{name}: expected finite values, got {bad.size} NaN or infinite, the first at flat index {bad[0]}"
        )


def decode_old(codes: Any) -> Any:
    """Return the seed's z of its codes, -1 to 1 in steps of 2/255; no code is 0 exactly."""
    return codes / np.float32(127.5) - np.float32(1.0)


def qins_encode(weight: Any, alpha: float = 1.0, quantize: bool = False) -> Any:
    """Encode weights as z = sign/(1 + alpha |w|); the sign of zero is +1.

    Args:
        weight: floating-point torch tensor or NumPy array of any shape.
        alpha: slope; larger spreads small weights further.
        quantize: one byte a weight instead of float32.

    Returns:
        float32 z of weight's shape; or, quantised, uint8 codes that carry their range of |z| as attributes z_min
        and z_max (a RationalTensor or a RationalArray).

    Raises:
        ValueError: a weight is NaN or infinite, or alpha is not a positive number.

    """
    warn_deprecated("qins_encode")
    alpha = check_alpha(alpha)
    if is_torch(weight):
        from . import _rational_torch

        return _rational_torch.encode_tensor(weight, alpha, quantize)
    array = np.asarray(weight)
    if array.dtype.kind != "f":
        raise TypeError(f"weight: expected a floating-point array, got {array.dtype}")
    if not quantize:
        check_finite("weight", array)
        return project(array, alpha, back=False)
    e = quantise(array, alpha)
    codes = e.fields["w_encoded"].view(RationalArray)
    codes.z_min, codes.z_max = float(e.fields["z_min"]), float(e.fields["z_max"])
    return codes


def qins_decode(encoded: Any, alpha: float = 1.0, is_quantized: bool = False) -> Any:
    """Return float32 weights: sign (1 - |z|)/(alpha |z|).

    Args:
        encoded: what `qins_encode` returned; or the seed's own quantised codes, plain uint8, whose z is
            code/255 * 2 - 1.
        alpha: as for `qins_encode`.
        is_quantized: whether `encoded` holds codes instead of z.

    Raises:
        TypeError, ValueError: `encoded` is not what is_quantized says, or holds a z outside [-1, 1] or 0.

    """
    warn_deprecated("qins_decode")
    alpha = check_alpha(alpha)
    if is_torch(encoded):
        from . import _rational_torch

        return _rational_torch.decode_tensor(encoded, alpha, is_quantized)
    array = np.asarray(encoded)
    return decode_array(array, getattr(encoded, "z_min", None), getattr(encoded, "z_max", None), alpha, is_quantized)


def decode_array(codes: Array, z_min: float | None, z_max: float | None, alpha: float, is_quantized: bool) -> Array:
    """`qins_decode` of a NumPy array whose range is told."""
    if not is_quantized:
        if codes.dtype.kind != "f":
            raise TypeError(f"encoded: expected floating-point z (is_quantized=False), got {codes.dtype}")
        size = np.abs(codes)
        if not ((size > 0) & (size <= 1)).all():
            raise ValueError("encoded: expected 0 < |z| <= 1 everywhere")
        return project(codes, alpha, back=True)
    if codes.dtype != np.uint8:
        raise TypeError(f"encoded: expected uint8 codes (is_quantized=True), got {codes.dtype}")
    if z_min is None or z_max is None:
        return project(decode_old(codes), alpha, back=True)
    fields = {"w_encoded": np.asarray(codes), "alpha": alpha, "z_min": z_min, "z_max": z_max}
    return EncodedArray.from_fields("rational", fields).decode()


def __getattr__(name: str) -> Any:
    if name in _TORCH_NAMES:
        from . import _rational_torch

        return getattr(_rational_torch, name)
    raise AttributeError(f"module 'qins.rational' has no attribute {name!r}")
