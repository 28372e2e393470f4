"""The fields of each codec: names, order, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _core


def field_names(codec: str, group_size: int | None) -> tuple[str, ...]:
    """Return the names of a codec's fields, in the operators' order."""
    return (*array_names(codec, group_size), *SCALARS[codec])


# Bits of a code, for log8's family: log8 and the packed codecs, which have fewer levels.
LOG_BITS = {"log8": 8, "log6": 6, "log5": 5, "log4": 4}
# Fields of each codec: arrays in the C core's order, then scalars. `group_scale` joins the arrays of log8's family when
# the inputs are grouped.
ARRAYS: dict[str, tuple[str, ...]] = {
    "golden": ("stored", "sign"),
    "log9": ("stored", "sign_bits"),
    "log8": ("codes", "scale"),
    "log6": ("codes6", "scale"),
    "log5": ("codes5", "scale"),
    "log4": ("codes4", "scale"),
    "rational": ("w_encoded",),
}
SCALARS: dict[str, tuple[str, ...]] = {
    "golden": ("log_min", "log_max"),
    "log9": ("log_min", "log_max"),
    "rational": ("alpha", "z_min", "z_max"),
    **dict.fromkeys(LOG_BITS, ("mu",)),
}
# The role of each field: "codes" (one per weight, or packed), "sign" or "range".
FIELD_ROLES = {
    "stored": "codes", "codes": "codes", "codes6": "codes", "codes5": "codes", "codes4": "codes", "w_encoded": "codes",
    "sign": "sign", "sign_bits": "sign",
    "scale": "range", "group_scale": "range", "mu": "range", "log_min": "range", "log_max": "range",
    "alpha": "range", "z_min": "range", "z_max": "range",
}  # fmt: skip
# Stacks of expert matrices in a mixture; their fields are named `<stack>_<field>`.
EXPERT_STACKS = ("gate_up_proj", "up_proj", "down_proj")
_STACKED_FIELDS = {f"{stack}_{field}": (stack, field) for stack in EXPERT_STACKS for field in FIELD_ROLES}
FIELD_DTYPES: dict[str, np.dtype[Any]] = {
    "stored": np.dtype(np.uint8),
    "sign": np.dtype(np.int8),
    "sign_bits": np.dtype(np.uint8),
    "codes": np.dtype(np.uint8),
    "codes6": np.dtype(np.uint8),
    "codes5": np.dtype(np.uint8),
    "codes4": np.dtype(np.uint8),
    "scale": np.dtype(np.float32),
    "group_scale": np.dtype(np.uint8),
    "w_encoded": np.dtype(np.uint8),
}


def check_codec(codec: str) -> str:
    """Return `codec`, or raise the ValueError that lists the codecs."""
    if codec not in _core.CODECS:
        raise ValueError(f"codec: expected one of {', '.join(_core.CODECS)}, got {codec!r}")
    return codec


def check_group_size(codec: str, group_size: int | None) -> int | None:
    """Return `group_size`, or raise the ValueError that says why `codec` cannot have it."""
    if group_size is None:
        return _PACKED_GROUP_SIZE if is_packed(codec) else None
    if codec not in LOG_BITS:
        raise ValueError(
            f"group_size: expected None for codec {codec!r} (only {', '.join(LOG_BITS)} are grouped), "
            f"got {group_size!r}"
        )
    if not isinstance(group_size, (int, np.integer)) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"group_size: expected a positive integer or None, got {group_size!r}")
    if group_size > _MOST_GROUP_SIZE:
        raise ValueError(f"group_size: expected at most {_MOST_GROUP_SIZE}, got {group_size}")
    if is_packed(codec) and group_size != 32 and group_size % 64:
        raise ValueError(f"group_size: expected 32 or a multiple of 64 for codec {codec!r}, got {group_size}")
    return int(group_size)


# Kernels multiply group sizes, which must not overflow; args.c checks the same.
_MOST_GROUP_SIZE = 1 << 30
# Packed codes are always grouped: with so few levels, per-row scales would lose 3 dB and more.
_PACKED_GROUP_SIZE = 32


_PACKED_BITS = {codec: bits for codec, bits in LOG_BITS.items() if bits < 8}


def is_packed(codec: str) -> bool:
    """Return whether codes have fewer than 8 bits and are packed: those of log6, log5 and log4."""
    return codec in _PACKED_BITS


def code_width(codec: str, cols: int) -> int:
    """Return the number of bytes in a row of codes; raise a ValueError if `codec` cannot have `cols` columns."""
    bits = _PACKED_BITS.get(codec)
    if bits is None:
        return cols
    if cols % 8:
        raise ValueError(f"weights: expected a multiple of 8 input features for codec {codec!r}, got {cols}")
    return cols // 8 * bits


def code_columns(codec: str, width: int) -> int:
    """Return the number of columns of a row of codes of `width` bytes; raise a ValueError if no number fits."""
    bits = _PACKED_BITS.get(codec)
    if bits is None:  # tested first, because each step shows in the time of a small layer
        return width
    if width % bits:
        name = ARRAYS[codec][0]
        raise ValueError(f"{name}: expected rows of a multiple of {bits} bytes for {codec}, got {width}")
    return width // bits * 8


def weights_of(field: str, elements: int) -> int:
    """Return the number of weights whose codes are in a field with this many elements."""
    return elements * 8 // _BITS_OF_FIELD.get(field, 8)


_BITS_OF_FIELD = {ARRAYS[codec][0]: bits for codec, bits in LOG_BITS.items()}


def check_alpha(alpha: float) -> float:
    """Return rational's alpha as a float, or raise a ValueError if it is not positive and finite in float32."""
    if not isinstance(alpha, (int, float, np.integer, np.floating)) or not 1e-30 <= alpha <= 1e30:
        raise ValueError(f"alpha: expected a positive number, 1e-30 to 1e30, got {alpha!r}")
    return float(alpha)


def array_names(codec: str, group_size: int | None) -> tuple[str, ...]:
    """Return the names of the array fields, in the C core's order."""
    return (*ARRAYS[codec], "group_scale") if group_size else ARRAYS[codec]


# the core's numbers of codecs
CODEC_NUMBER = {name: i for i, name in enumerate(_core.CODECS)}


def core_addresses(at: Sequence[int], codec: str, group_size: int | None) -> tuple[int, int, int, int, int]:
    """Arrange the addresses of all fields for the core: codes, second and third array, two scalars; 0 for none."""
    if codec not in LOG_BITS:
        return at[0], at[1], 0, at[2], at[3]
    return (at[0], at[1], at[2], at[3], 0) if group_size else (at[0], at[1], 0, at[2], 0)


def field_shapes(codec: str, shape: tuple[int, ...], group_size: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the array fields for weights of this shape; the last dimension is in_features."""
    lead, cols = shape[:-1], shape[-1] if shape else 1
    shapes = {"stored": shape, "sign": shape, "codes": shape, "w_encoded": shape, "scale": lead}
    if is_packed(codec):
        shapes[ARRAYS[codec][0]] = (*lead, code_width(codec, cols))
    shapes["sign_bits"] = (*lead, -(-cols // 8))
    shapes["group_scale"] = (*lead, -(-cols // group_size)) if group_size else ()
    return {name: shapes[name] for name in array_names(codec, group_size)}


def split_field(name: str) -> tuple[str, str] | None:
    """Return ("", field) for a buffer's name, (stack, field) for one of experts, or None if it holds no codes."""
    return ("", name) if name in FIELD_ROLES else _STACKED_FIELDS.get(name)
