"""What the command line prints on stderr in addition to its results, and how --quiet and --verbose change that."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..system import allow_bars

_QUIET, _VERBOSE = ("-q", "--quiet"), ("-v", "--verbose")
# Commands with a --verbose of their own, which prints tokens per second.
_OWN_VERBOSE = ("generate", "chat")


def split_arguments(arguments: list[str]) -> tuple[bool, bool, list[str]]:
    """Return whether to be quiet, whether to be verbose, and the other arguments.

    Both options may be before or after the command. After `--` they are ordinary arguments.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    command = next((i for i, a in enumerate(arguments[:end]) if not a.startswith("-")), end)
    own = command < end and arguments[command] in _OWN_VERBOSE
    options = [
        (i, a) for i, a in enumerate(arguments[:end]) if a in _QUIET or (a in _VERBOSE and not (own and i > command))
    ]
    places = {i for i, _ in options}
    left = [a for i, a in enumerate(arguments) if i not in places]
    return any(a in _QUIET for _, a in options), any(a in _VERBOSE for _, a in options), left


def show_warning(message: Warning | str, *args: Any) -> None:
    """Print a warning on one line, as errors are printed."""
    Console(stderr=True, soft_wrap=True).print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False)


@contextmanager
def noise(quiet: bool, verbose: bool) -> Iterator[None]:
    """Hide libraries' warnings, unless verbose, and bars outside a terminal; if quiet, hide all bars and warnings."""
    bars = sys.stderr.isatty() and not quiet
    told = {} if verbose else {"TRANSFORMERS_VERBOSITY": "error"}
    if not bars:
        told |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    new = {k: v for k, v in told.items() if k not in os.environ}
    os.environ.update(new)  # libraries read these when they are imported
    allow_bars(bars)
    shown, handler = warnings.showwarning, logging.StreamHandler()
    warnings.showwarning = (lambda *a, **k: None) if quiet else show_warning  # type: ignore[assignment]
    begin = time.perf_counter()
    logger = logging.getLogger("qins")
    if quiet or verbose:
        level = logging.ERROR if quiet else logging.INFO
        logger.addHandler(handler)
        before = logger.level
        logger.setLevel(level)
    try:
        yield
    finally:
        if verbose:
            print(f"took {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        if quiet or verbose:
            logger.removeHandler(handler)
            logger.setLevel(before)
        warnings.showwarning = shown
        allow_bars(True)
        for name in new:
            os.environ.pop(name, None)
