"""Errors of the system: they name their file, and an interrupted opening is none."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OF_RUST = re.compile(r"\(os error (\d+)\)")  # as safetensors and tokenizers tell an error of the system


@contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Name a file, or a directory, in errors of the system that name none: those of reading, writing and mapping.

    What libraries in Rust raise for an error of the system, of any class, becomes an OSError.
    """
    try:
        yield
    except ValueError:  # raised by this package, with a file's name
        raise
    except Exception as e:
        told = _OF_RUST.search(str(e))
        if told and str(path) not in str(e):
            raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from e
        if isinstance(e, OSError) and e.errno is not None and e.filename is None:
            e.filename = str(path)
        raise


def uninterrupted(opening: Callable[[], Any]) -> Any:
    """Return what a call returns; make it again if a signal interrupts torch while it opens a file."""
    while True:
        try:
            return opening()
        except RuntimeError as e:
            if os.strerror(errno.EINTR) not in str(e):
                raise
