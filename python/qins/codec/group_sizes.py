"""Group sizes: the default ones and the slow ones."""

from __future__ import annotations

import warnings

from .fields import check_codec, check_group_size, is_packed

# On every model measured, groups of 64 are closer to the original than groups of 128 and llama.cpp's Q8_0, at about the
# same speed (docs/performance.md has the figures). They cost one byte per 64 codes.
_DEFAULT_GROUP_SIZE = 64


def default_group_size(in_features: int) -> int:
    """Return log8's default group size: 64, whatever in_features is; the last group of a row may be shorter."""
    return _DEFAULT_GROUP_SIZE


def resolve_group_size(codec: str, group_size: int | str | None, in_features: int) -> int | None:
    """Check a group_size argument. "default" becomes 64 for log8, 32 for packed codecs and None for others."""
    check_codec(codec)
    if isinstance(group_size, str):
        if group_size != "default":
            raise ValueError(f"group_size: expected a positive integer, None or 'default', got {group_size!r}")
        return default_group_size(in_features) if codec == "log8" else check_group_size(codec, None)
    return check_group_size(codec, group_size)


def format_of(codec: str, group_size: int | str | None, in_features: int) -> tuple[str, int | None]:
    """Return the codec and group size of a model's matrix; log8 replaces a packed codec that its rows do not fit."""
    size = resolve_group_size(codec, group_size, in_features)
    if not fallback_note(codec, in_features):
        return codec, size
    return "log8", resolve_group_size("log8", "default" if group_size == "default" else size, in_features)


def fallback_note(codec: str, in_features: int) -> str:
    """Return why a matrix gets log8 instead of a packed codec; empty if it gets the codec."""
    if not is_packed(codec) or in_features % 8 == 0:
        return ""
    return f"log8 instead of {codec}: {in_features} inputs are not a multiple of 8"


def slow_group_size(codec: str, group_size: int | str | None) -> str:
    """Return a warning for a group size with slow products; empty for others."""
    if codec != "log8" or not isinstance(group_size, int) or group_size == 32 or group_size % 64 == 0:
        return ""
    below = 32 if group_size < 64 else group_size // 64 * 64
    nearest = "32" if group_size < 32 else f"{below} or {group_size // 64 * 64 + 64}"
    return (
        f"group_size {group_size}: products decode the weights first and take several times longer; expected {nearest} "
        "(32, a multiple of 64, or per-row scales)"
    )


def warn_if_slow(codec: str, group_size: int | str | None) -> None:
    """Warn about a group size with slow products."""
    told = slow_group_size(codec, group_size)
    if told:
        warnings.warn(told, stacklevel=1)  # attributed to this line, so once per process whatever creates the layers
