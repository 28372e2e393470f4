"""Files that are complete or absent, never half-written."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .naming import naming_file


@contextmanager
def atomically(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. On success it is synced and renamed to `target`; on error it is deleted."""
    temporary = target.with_name(target.name + ".tmp")
    if temporary.is_symlink():  # writing would follow it
        temporary.unlink()
    with naming_file(target):
        try:
            yield temporary
            with temporary.open("r+b") as f:
                os.fsync(f.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file and delete it afterward. The system releases the lock of a process that dies.

    Raises:
        BlockingIOError: another process holds the lock; the message is `what`.

    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            with naming_file(path):
                _lock(file, what)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file), path.stat()):
                        break
                # its holder deleted it meanwhile
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    try:
        yield
    finally:
        try:
            if sys.platform != "win32":  # while still locked, so that nobody waits on a deleted file
                path.unlink(missing_ok=True)
        finally:
            with naming_file(path):
                os.close(file)
        if sys.platform == "win32":  # which cannot delete open files, not even another holder's
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
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # file systems without locks
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
