"""Which group sizes there are, which one is the default, and which are slow."""

from __future__ import annotations

import warnings

from .fields import check_codec, check_group_size

# One more byte for 128 codes: 1 dB better than one scale a row at no loss of speed, and still 3.96
# times smaller than float32 (docs/formats.md has the figures). The others are for rows that 128 would
# leave a short group of, which takes a byte, too.
_DEFAULT_GROUP_SIZES = (128, 192, 256)


def default_group_size(in_features: int) -> int:
    """Inputs that share a group scale in a log8 layer: 128, or 192 or 256 where these divide a row and 128 does not."""
    return next((size for size in _DEFAULT_GROUP_SIZES if in_features % size == 0), _DEFAULT_GROUP_SIZES[0])


def resolve_group_size(codec: str, group_size: int | str | None, in_features: int) -> int | None:
    """Check a group_size argument; "default" stands for `default_group_size` in a log8 layer."""
    check_codec(codec)
    if isinstance(group_size, str):
        if group_size != "default":
            raise ValueError(f"group_size: expected a positive integer, None or 'default', got {group_size!r}")
        return default_group_size(in_features) if codec == "log8" else None
    return check_group_size(codec, group_size)


def slow_group_size(codec: str, group_size: int | str | None) -> str:
    """A sentence on a group size that products are slow with; empty for others."""
    if codec != "log8" or not isinstance(group_size, int) or group_size == 32 or group_size % 64 == 0:
        return ""
    below = 32 if group_size < 64 else group_size // 64 * 64
    nearest = "32" if group_size < 32 else f"{below} or {group_size // 64 * 64 + 64}"
    return (
        f"group_size {group_size}: products decode the weights first and take several times longer; expected {nearest} "
        "(32, a multiple of 64, or one scale a row)"
    )


def warn_if_slow(codec: str, group_size: int | str | None) -> None:
    """Warn of a group size that products are slow with."""
    told = slow_group_size(codec, group_size)
    if told:
        warnings.warn(told, stacklevel=1)  # as if from here: once a process, whatever makes the layers
