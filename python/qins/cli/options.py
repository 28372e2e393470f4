"""Conversion of options that several commands share."""

from __future__ import annotations


def group_size_of(given: int | None) -> int | str | None:
    """Return --group-size in the form that `convert` expects: the default if not given, None (per-row scales) for 0."""
    return "default" if given is None else given or None
