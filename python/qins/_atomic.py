"""Files that are complete under their names, or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomically(target: Path) -> Iterator[Path]:
    """Lend a name to write a file to; it becomes `target`, on the disk, when all went well, and goes otherwise."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        yield temporary
        with temporary.open("r+b") as f:
            os.fsync(f.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
