"""Encoding NumPy arrays to codes, decoding them, and multiplying with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _core
from ..system import get_num_threads
from .dtypes import Array, as_matrix, element_dtype, matrix_shape
from .fields import (
    FIELD_DTYPES,
    LOG_BITS,
    SCALARS,
    array_names,
    check_alpha,
    check_codec,
    check_group_size,
    code_columns,
    field_shapes,
    is_packed,
)

# ln of the largest float32: a larger log_max would decode to infinity
_LOG_FLT_MAX = 88.7228394


class EncodedArray:
    """Quantized weights: codes and their scales.

    Attributes:
        codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".
        shape: shape of the weights; the last dimension is in_features.
        group_size: inputs per group scale (log8, log6, log5, log4), or None.
        fields: field name to array, as in docs/formats.md; scalars are 0-d float32 arrays.

    """

    __slots__ = ("codec", "fields", "group_size", "shape")

    def __init__(self, codec: str, shape: tuple[int, ...], fields: dict[str, Array], group_size: int | None) -> None:
        """For internal use; construct with `encode` or `from_fields`."""
        self.codec = codec
        self.shape = shape
        self.fields = fields
        self.group_size = group_size

    @classmethod
    def from_fields(cls, codec: str, fields: Mapping[str, Any], group_size: int | None = None) -> EncodedArray:
        """Wrap existing fields after checking every one of them.

        C-contiguous arrays in native byte order, including read-only and unaligned ones, are used without a copy. Other
        arrays are copied.

        Args:
            codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".
            fields: field name to array or number, as in docs/formats.md.
            group_size: inputs per group scale, or None. For log6, log5 and log4, None means 32.

        Returns:
            the codes.

        Raises:
            ValueError, TypeError: a field is missing, unknown, of the wrong dtype or shape, or holds a value outside
                its format. The message names the field.

        """
        check_codec(codec)
        group_size = check_group_size(codec, group_size)
        names = array_names(codec, group_size)
        expected = {*names, *SCALARS[codec]}
        if set(fields) != expected:
            raise ValueError(
                f"fields: expected {sorted(expected)} for {codec} with group_size {group_size}, got {sorted(fields)}"
            )
        checked: dict[str, Array] = {}
        for name in names:
            array = np.asarray(fields[name], order="C")
            if array.dtype.newbyteorder("=") != FIELD_DTYPES[name]:
                raise TypeError(f"{name}: expected dtype {FIELD_DTYPES[name]}, got {array.dtype}")
            checked[name] = array.astype(FIELD_DTYPES[name], copy=False)
        shape = checked[names[0]].shape
        if is_packed(codec):
            if not shape:
                raise ValueError(f"{names[0]}: expected at least one dimension for {codec}, got shape ()")
            shape = (*shape[:-1], code_columns(codec, shape[-1]))
        for name, want in field_shapes(codec, shape, group_size).items():
            if checked[name].shape != want:
                raise ValueError(f"{name}: expected shape {want} beside codes of {shape}, got {checked[name].shape}")
        for name in SCALARS[codec]:
            checked[name] = _scalar(name, fields[name])
        _check_values(codec, shape, checked)
        return cls(codec, shape, checked, group_size)

    @property
    def nbytes(self) -> int:
        """Total bytes of all fields."""
        return sum(f.nbytes for f in self.fields.values())

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The array fields, 2-D (codes) and 1-D (scale), in the C core's order."""
        rows, _ = matrix_shape(self.shape)
        fields = (self.fields[n] for n in array_names(self.codec, self.group_size))
        return tuple(
            f.reshape(rows) if f.dtype == np.float32 else f.reshape(rows, f.shape[-1] if f.ndim else 1) for f in fields
        )

    @property
    def scalars(self) -> tuple[float, ...]:
        """The scalar fields, in the C core's order."""
        return tuple(float(self.fields[n]) for n in SCALARS[self.codec])

    def decode(self, dtype: Any = np.float32, *, out: Array | None = None) -> Array:
        """Return the dequantized weights.

        Args:
            dtype: float32 (exact), float16, float64 or bfloat16 (from ml_dtypes), rounded to nearest even.
            out: array to write to, with this dtype and `shape` and contiguous rows; None allocates one.

        Returns:
            `out`, or a new array.

        Raises:
            TypeError: `dtype` is not supported, or `out` is not a NumPy array.
            ValueError: `out` has another shape, dtype or layout.

        """
        name, held = element_dtype(dtype)
        if out is None:
            out = np.empty(self.shape, np.dtype(dtype))
        elif not isinstance(out, np.ndarray):
            raise TypeError(f"out: expected a NumPy array, got {type(out).__name__}")
        elif out.shape != self.shape or out.dtype != np.dtype(dtype):
            raise ValueError(
                f"out: expected shape {self.shape} and dtype {np.dtype(dtype).name}, "
                f"got shape {out.shape} and dtype {out.dtype.name}"
            )
        matrix = out.view(held) if name == "bfloat16" else out
        if matrix.ndim != 2:
            if not matrix.flags.c_contiguous:
                raise ValueError("out: expected a C-contiguous array, got a strided one")
            matrix = matrix.reshape(matrix_shape(self.shape))
        self.decode_block(matrix, name, 0, 0)
        return out

    def decode_block(self, out: Array, dtype: str, row: int, col: int) -> None:
        """Decode the block of out's 2-D shape at (row, col); `dtype` is the name of its element type."""
        rows, cols = matrix_shape(self.shape)
        _core.decode(
            self.codec, self.arrays, self.scalars, rows, cols, self.group_size or 0, out, dtype, row, col,
            get_num_threads(),
        )  # fmt: skip

    def __repr__(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"EncodedArray(codec={self.codec!r}, shape={self.shape}{group}, nbytes={self.nbytes})"


def _scalar(name: str, value: Any) -> Array:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected one number, got {array.dtype} of shape {array.shape}")
    return np.array(array.reshape(()), dtype=np.float32)


def _check_values(codec: str, shape: tuple[int, ...], f: Mapping[str, Array]) -> None:
    if codec in LOG_BITS:
        mu = float(f["mu"])
        if not 0.0 <= mu <= _core.MU_MAX:
            raise ValueError(f"mu: expected 0 to {_core.MU_MAX:g}, got {mu}")
        scale = f["scale"]
        bad = ~(np.isfinite(scale) & (scale >= 0))
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise ValueError(f"scale: expected finite numbers >= 0, got {scale.reshape(-1)[at]} at flat index {at}")
        return
    if codec == "rational":
        if not (math.isfinite(f["alpha"]) and f["alpha"] > 0):
            raise ValueError(f"alpha: expected a positive finite number, got {f['alpha']}")
        if not 0.0 < f["z_min"] <= f["z_max"] <= 1.0:
            raise ValueError(f"z_min, z_max: expected 0 < z_min <= z_max <= 1, got {f['z_min']}, {f['z_max']}")
        return
    lo, hi = float(f["log_min"]), float(f["log_max"])
    if not (math.isfinite(lo) and lo <= hi <= _LOG_FLT_MAX):
        raise ValueError(f"log_min, log_max: expected finite, ascending, at most {_LOG_FLT_MAX}, got {lo}, {hi}")
    if not f["stored"].all():
        at = int(np.flatnonzero(f["stored"] == 0)[0])
        raise ValueError(f"stored: expected codes 1 to 255, got 0 at flat index {at}")
    if codec == "golden":
        bad = np.abs(f["sign"]) != 1
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise ValueError(f"sign: expected -1 or +1, got {f['sign'].reshape(-1)[at]} at flat index {at}")
    elif shape and shape[-1] % 8 and (f["sign_bits"][..., -1] >> (shape[-1] % 8)).any():
        raise ValueError("sign_bits: expected zeros in the unused bits of each row's last byte, got ones")


def encode(
    weights: Any,
    codec: str = "log8",
    *,
    group_size: int | None = None,
    mu: float | None = None,
    alpha: float | None = None,
    importance: Any = None,
) -> EncodedArray:
    """Quantize weights.

    Args:
        weights: float32, float16, float64 or bfloat16 array (or CPU tensor) of any shape and strides. Rows are output
            features, the last dimension is input features. Values are converted to float32.
        codec: "log8"; "log6", "log5" or "log4" for fewer bits; "log9", "golden" or (deprecated) "rational".
            docs/formats.md has the formulas.
        group_size: inputs per group scale. log8: None for per-row scales only. log6, log5, log4: 32 or a multiple of
            64; None means 32, and in_features must be a multiple of 8.
        mu: log8, log6, log5, log4: curvature of the levels, 0 (linear) to 65536; None searches for the best value.
        alpha: rational: slope of the levels; None for 1.
        importance: log8, log6, log5, log4: weight of each input's squared error in the search for mu and scales, such
            as the input's mean square; shape (in_features,), finite, not negative. `qins.ErrorFeedback` builds on this.

    Returns:
        the codes.

    Raises:
        ValueError: a weight is NaN or infinite (the message has their number and the index of the first), or an
            argument is out of range.
        TypeError: the weights are not floating-point.

    """
    check_codec(codec)
    group_size = check_group_size(codec, group_size)
    if mu is not None:
        if codec not in LOG_BITS:
            raise ValueError(f"mu: expected None for codec {codec!r}, got {mu!r}")
        if not 0.0 <= float(mu) <= _core.MU_MAX:
            raise ValueError(f"mu: expected 0 to {_core.MU_MAX:g}, got {mu!r}")
    parameter = -1.0 if mu is None else float(mu)
    if codec == "rational":
        parameter = check_alpha(1.0 if alpha is None else alpha)
    elif alpha is not None:
        raise ValueError(f"alpha: expected None for codec {codec!r}, got {alpha!r}")
    matrix, dtype, shape = as_matrix(weights)
    shapes = field_shapes(codec, shape, group_size)
    fields: dict[str, Array] = {n: np.empty(s, FIELD_DTYPES[n]) for n, s in shapes.items()}
    e = EncodedArray(codec, shape, fields, group_size)
    weighed = None if importance is None else _check_importance(codec, importance, matrix.shape[1])
    found = _core.encode(codec, matrix, dtype, e.arrays, group_size or 0, parameter, weighed, get_num_threads())
    fields.update({n: np.array(v, np.float32) for n, v in zip(SCALARS[codec], found, strict=True)})
    return e


def _check_importance(codec: str, importance: Any, cols: int) -> Array:
    if codec not in LOG_BITS:
        raise ValueError(f"importance: expected None for codec {codec!r}, got an array")
    array = np.asarray(importance, np.float64)
    if array.shape != (cols,):
        raise ValueError(f"importance: expected shape ({cols},), got {array.shape}")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError("importance: expected finite numbers that are not negative, got others")
    # only ratios matter, so scale the mean to 1, where float32 is most precise; all zeros mean no preference
    mean = array.mean() if cols else 0.0
    return np.asarray(array / mean if mean > 0 else np.ones(cols), np.float32)


def decode(e: EncodedArray, dtype: Any = np.float32, *, out: Array | None = None) -> Array:
    """Return the dequantized weights; see `EncodedArray.decode`."""
    return e.decode(dtype, out=out)


# Dequantized weights held at a time: small enough for the L2 cache, large enough for BLAS.
_TILE = 1 << 20


def matmul(x: Any, e: EncodedArray, *, out: Array | None = None) -> Array:
    """Return x @ W.T, where W of shape (N, K) are the weights in `e`.

    The product is computed straight from the codes and summed in float32. Its relative error is below 2e-4 for log8,
    log6, log5 and log4, whose kernels round activations to 15 bits with one scale for 64 or 128 columns, and below 1e-6
    for golden and log9. A float64 x is multiplied with dequantized weights in float64.

    Args:
        x: floating-point array of shape (..., K).
        e: codes of a matrix.
        out: array of shape (..., N) and x's dtype to write to; None allocates one.

    Returns:
        `out`, or a new array of shape (..., N) and x's dtype.

    Raises:
        ValueError: `e` is not a matrix, x does not fit it, or `out` does not fit or overlaps x.
        TypeError: the dtype of x is not supported.

    """
    if len(e.shape) != 2:
        raise ValueError(f"e: expected codes of a matrix, got shape {e.shape}")
    x = np.asarray(x)
    element_dtype(x.dtype)
    rows, cols = e.shape
    if x.ndim == 0 or x.shape[-1] != cols:
        raise ValueError(f"x: expected shape (..., {cols}), got {x.shape}")
    shape = (*x.shape[:-1], rows)
    if out is None:
        out = np.empty(shape, x.dtype)
    elif out.shape != shape or out.dtype != x.dtype:
        raise ValueError(f"out: expected shape {shape} and dtype {x.dtype}, got {out.shape} and {out.dtype}")
    elif np.may_share_memory(out, x):
        raise ValueError("out: expected memory of its own, got memory that overlaps x")
    x = x.reshape(math.prod(x.shape[:-1]), cols)
    if x.dtype == np.float64:
        _matmul_by_tiles(x, e, out)
        return out
    name, held = element_dtype(x.dtype)
    x2 = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("=")).view(held)
    y = out if out.flags.c_contiguous and out.dtype.isnative else np.empty(shape, x2.dtype)
    y2 = (y.view(held) if y.dtype != held else y).reshape(x2.shape[0], rows)
    _core.linear(e.codec, e.arrays, e.scalars, rows, cols, e.group_size or 0, x2, name, y2, get_num_threads())
    if y is not out:
        out[...] = y.view(x.dtype.newbyteorder("="))
    return out


def _matmul_by_tiles(x: Array, e: EncodedArray, out: Array) -> None:
    """X @ W.T in float64, a few dequantized rows at a time."""
    rows, cols = e.shape
    result = np.empty((x.shape[0], rows))
    step = max(1, _TILE // max(cols, 1))
    tile = np.empty((min(step, rows), cols))
    for row in range(0, rows, step):
        part = tile[: min(step, rows - row)]
        e.decode_block(part, "float64", row, 0)
        np.matmul(x, part.T, out=result[:, row : row + step])
    out[...] = result.reshape(out.shape)
