"""Functions of rooms above, for rooms that may not import them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Name to function. The package fills it in, since only what is outside the rooms may import them all.
upward: dict[str, Callable[..., Any]] = {}
