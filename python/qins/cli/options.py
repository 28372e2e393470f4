"""What options of several commands stand for."""

from __future__ import annotations


def group_size_of(given: int | None) -> int | str | None:
    """Return --group-size as `convert` takes it: the default, or per-row scales for 0."""
    return "default" if given is None else given or None
