"""Files that are complete under their names, or not there."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, which goes afterwards; the system gives up the lock of a process that dies.

    Raises:
        BlockingIOError: another holds it; `what` says who that may be.

    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file, what)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):  # else its holder has removed it since
                break
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    try:
        yield
    finally:
        if sys.platform != "win32":  # while it is still locked, so that nobody waits for a file that goes
            path.unlink(missing_ok=True)
        os.close(file)
        if sys.platform == "win32":  # which does not remove open files, of another holder's neither
            with suppress(OSError):
                path.unlink()


def _lock(file: int, what: str) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(what) from None
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # of a file system that has no locks
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
