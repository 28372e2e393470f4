"""Progress bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_allowed = True


def allow_bars(allowed: bool) -> None:
    """Set whether bars appear on a terminal by default; `show=True` shows one in any case."""
    global _allowed
    _allowed = allowed


class Advance(Protocol):
    """Advances a bar by n steps; a text replaces its description."""

    def __call__(self, n: int, told: str | None = None, /) -> None:
        """Advance."""


@contextmanager
def progress(description: str, total: int, show: bool | None, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Yield a function that advances a bar by n steps; it does nothing without a terminal or without rich."""
    if show is None:
        show = _allowed and sys.stderr.isatty()
    if show:
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
        except ImportError:
            show = False
    if not show:
        yield lambda n, told=None: None
        return
    amount = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (TaskProgressColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n, told=None: bar.update(task, advance=n, description=told)
