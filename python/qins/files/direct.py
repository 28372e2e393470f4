"""Direct I/O: large reads and writes that bypass the page cache, where the system and the file allow it.

Filling the page cache costs more CPU time than encoding what was read, and evicts the pages of other programs.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Offsets, lengths and addresses must be multiples of this. A file that needs larger multiples raises an OSError.
BLOCK = 4096
_REQUEST = 1 << 22  # bytes per request: few, so that reads and writes take turns at the disk
KNOWN = all(hasattr(os, name) for name in ("O_DIRECT", "preadv"))
_FLAG = os.O_DIRECT if KNOWN else 0


def aligned_memory(size: int) -> mmap.mmap:
    """Return memory aligned for direct reading and writing."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def blocks_around(begin: int, size: int) -> tuple[int, int]:
    """Return the offset and size of the blocks that contain a part of a file."""
    first = begin // BLOCK * BLOCK
    return first, -(-(begin + size - first) // BLOCK) * BLOCK


def read_directly(path: Path, begin: int, size: int, memory: memoryview) -> None:
    """Fill memory with the blocks around a part of a file; available where KNOWN.

    Raises:
        OSError: the file system does not support direct reading, or the file ends before the part does.

    """
    first, length = blocks_around(begin, size)
    with _opened(path, os.O_RDONLY | _FLAG) as file:
        done = 0
        while first + done < begin + size:
            got = os.preadv(file, [memory[done : min(length, done + _REQUEST)]], first + done)
            done += got
            if got == 0 or (done % BLOCK and first + done < begin + size):
                raise OSError(f"{path}: ends at {first + done}, expected at least {begin + size} bytes")


class DirectWriter:
    """Writes parts of one file; whole blocks bypass the page cache."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._direct = -1
        if KNOWN:
            with suppress(OSError):  # as an in-memory file system raises
                self._direct = os.open(path, os.O_WRONLY | _FLAG)
        self._memory: mmap.mmap | None = None

    def truncate(self, size: int) -> None:
        """Set the file's size."""
        os.ftruncate(self._file.fileno(), size)  # unlike the file's own method, it resumes after a signal

    def write(self, data: memoryview, at: int) -> None:
        """Write bytes at offset `at`.

        Raises:
            OSError: as from any file; the bytes there are then undefined.

        """
        head = min(-at % BLOCK, len(data))
        whole = (len(data) - head) // BLOCK * BLOCK if self._direct >= 0 else 0
        self._write_buffered(data[:head], at)
        written = self._write_blocks(data[head : head + whole], at + head)
        self._write_buffered(data[head + written :], at + head + written)

    def _write_blocks(self, data: memoryview, at: int) -> int:
        """Write whole blocks; return the number of bytes written, fewer where the file refuses direct writing."""
        done = 0
        while done < len(data):
            if self._memory is None:
                self._memory = aligned_memory(_REQUEST)
            part = data[done : done + len(self._memory)]
            view = memoryview(self._memory)[: len(part)]
            view[:] = part
            try:
                done += os.pwrite(self._direct, view, at + done)
            except OSError as e:
                if e.errno != errno.EINVAL:  # EINVAL: the file needs larger blocks
                    raise
                break
            if done % BLOCK:
                break
        return done

    def _write_buffered(self, data: memoryview, at: int) -> None:
        self._file.seek(at)
        while data:
            data = data[self._file.write(data[:_REQUEST]) :]

    def close(self) -> None:
        """Close the file; closing it again does nothing."""
        direct, self._direct = self._direct, -1
        try:
            if direct >= 0:
                os.close(direct)
        finally:
            self._file.close()


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags)
    try:
        yield file
    finally:
        os.close(file)
