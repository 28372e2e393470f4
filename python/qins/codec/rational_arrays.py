"""The rational codec on NumPy arrays: z of weights, codes of z, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _core
from ..system import get_num_threads
from .array import EncodedArray, encode

Array = np.ndarray[Any, Any]


class RationalArray(np.ndarray[Any, Any]):
    """Codes of z, uint8, with the range of |z| that they cover; views and copies keep it.

    Attributes:
        z_min, z_max: ends of the range of |z|: level m stands for |z| = z_max - m/127 (z_max - z_min).

    """

    z_min: float | None
    z_max: float | None

    def __array_finalize__(self, obj: Any) -> None:
        """Take the range from the source array."""
        self.z_min = getattr(obj, "z_min", None)
        self.z_max = getattr(obj, "z_max", None)

    def __reduce__(self) -> Any:
        """Pickle the array with its range."""
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


def codes_of(weights: Any, alpha: float) -> EncodedArray:
    """Return the codes of weights: field w_encoded and its range."""
    return encode(weights, "rational", alpha=alpha)


def check_finite(name: str, array: Array) -> None:
    """Raise a ValueError with the number of NaN and infinities, if there are any."""
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{name}: expected finite values, got {bad.size} NaN or infinite, the first at flat index {bad[0]}"
        )


def decode_old(codes: Any) -> Any:
    """Return z of the prototype's codes, -1 to 1 in steps of 2/255; no code is exactly 0."""
    return codes / np.float32(127.5) - np.float32(1.0)


def decode_array(codes: Array, z_min: float | None, z_max: float | None, alpha: float, is_quantized: bool) -> Array:
    """`qins_decode` for a NumPy array with a known range."""
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
