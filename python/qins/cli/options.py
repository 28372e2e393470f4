"""Conversion of options that several commands share."""

from __future__ import annotations

import re


def group_size_of(given: int | None) -> int | str | None:
    """Return --group-size in the form that `convert` expects: the default if not given, None (per-row scales) for 0."""
    return "default" if given is None else given or None


_ADDRESS = r"ray://.+|auto|local|[\w.-]+:\d+|\[[\da-fA-F:]+\]:\d+"


def with_addresses(arguments: list[str]) -> list[str]:
    """Return arguments in which `--ray` has a value, empty if no address of a cluster follows it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    followed = [*arguments[1:end], "", *arguments[end:]]
    return [
        "--ray=" if a == "--ray" and i < end and not re.fullmatch(_ADDRESS, followed[i]) else a
        for i, a in enumerate(arguments)
    ]
