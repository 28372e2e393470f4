"""Memory for codes in pages of two megabytes instead of four kilobytes.

A token reads all codes once. With small pages, the processor looks up where a page is 500 times as often, in tables
that do not stay in its caches; in a virtual machine each look-up is several. On a virtual Zen 4, products of one row
are 1.3 times as fast with huge pages.
"""

from __future__ import annotations

import math
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .environment import switch
from .machine import available_bytes

_LEAST = 32 << 20  # bytes; less may stay in the caches
_HUGE = 2 << 20
_LINE = 64
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Arena:
    """Memory for arrays that live until the last of them is gone."""

    def __init__(self, nbytes: int) -> None:
        """Reserve memory for `nbytes` bytes of arrays, each of them rounded up to a multiple of 64.

        Raises:
            OSError: the system has no address space left, or does not know huge pages.

        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, nbytes + _HUGE, flags=flags)
        memory.madvise(mmap.MADV_HUGEPAGE)
        all_bytes = np.frombuffer(memory, np.uint8)
        begin = -all_bytes.ctypes.data % _HUGE
        self._free = all_bytes[begin : begin + nbytes]

    def copy(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return a C-contiguous copy of an array in this memory."""
        size = rounded(array.nbytes)
        place, self._free = self._free[: array.nbytes], self._free[size:]
        copied: np.ndarray[Any, Any] = place.view(array.dtype).reshape(array.shape)
        copied[...] = array
        return copied


def rounded(nbytes: int) -> int:
    """Return how many bytes an array of `nbytes` bytes takes in an arena."""
    return math.ceil(nbytes / _LINE) * _LINE


def arena_for(nbytes: int) -> Arena | None:
    """Return an arena for `nbytes` bytes, or None if it would gain nothing, or if there is too little memory.

    The environment variable QINS_HUGE_PAGES=0 prevents it.

    Raises:
        ValueError: QINS_HUGE_PAGES is neither 0 nor 1.

    """
    if not switch("QINS_HUGE_PAGES", True) or nbytes < _LEAST or not _are_there():
        return None
    there = available_bytes()
    if there is not None and there < nbytes + nbytes // 4:
        return None
    try:
        return Arena(nbytes)
    except OSError:
        return None


def _are_there() -> bool:
    try:
        return sys.platform == "linux" and "[never]" not in _SETTING.read_text()
    except OSError:
        return False
