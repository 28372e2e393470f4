"""Switches in the environment."""

from __future__ import annotations

import os


def switch(name: str, default: bool) -> bool:
    """Return whether the environment variable `name` is 1; `default` if it is unset or empty.

    Raises:
        ValueError: it is neither 0 nor 1.

    """
    told = os.environ.get(name, "")
    if told not in ("", "0", "1"):
        raise ValueError(f"environment variable {name}: expected 0 or 1, got {told!r}")
    return default if told == "" else told == "1"
