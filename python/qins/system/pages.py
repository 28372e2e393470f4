"""Advice to the system: which pages are no longer needed, and which come next."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def page_out(weight: torch.Tensor | np.ndarray[Any, Any]) -> None:
    """Release the pages of a weight in a mapped file, which would otherwise count as this process's until it exits.

    MADV_PAGEOUT loses nothing: a later read of the weight brings the pages back from the file.
    """
    _advise(weight, 21)


def let_go(tensor: torch.Tensor) -> None:
    """Release the pages of a weight as `page_out` does, even those that other processes have mapped.

    MADV_PAGEOUT leaves such pages alone, and they count in each process. MADV_DONTNEED would lose what this process has
    written, so it follows only where the kernel says that every page is the file's own.
    """
    page_out(tensor)
    begin, length = _whole_pages(tensor)
    if length > 0 and sys.platform == "linux" and _are_files_pages(begin, length):
        _advise(tensor, 4)


def _are_files_pages(begin: int, length: int) -> bool:
    """Return whether no page of a range holds anything but what its file does."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as f:
            f.seek(begin // mmap.PAGESIZE * 8)
            told = f.read(length // mmap.PAGESIZE * 8)
    except OSError:
        return False
    entries = np.frombuffer(told, np.uint64) >> np.uint64(61)
    present, swapped, of_file = entries & np.uint64(4), entries & np.uint64(2), entries & np.uint64(1)
    return len(told) == length // mmap.PAGESIZE * 8 and not swapped.any() and bool((of_file[present > 0] > 0).all())


def page_in(tensor: torch.Tensor) -> None:
    """Read a weight in a mapped file into memory, where the kernel supports MADV_POPULATE_READ."""
    _advise(tensor, 22)


def is_resident(tensor: torch.Tensor) -> bool:
    """Return whether a weight in a mapped file seems resident: checks its first, middle and last page, on Linux.

    For a file that this process may not write, the kernel always answers yes.
    """
    if sys.platform != "linux" or tensor.nbytes == 0:
        return True
    mincore, page, seen = ctypes.CDLL(None).mincore, mmap.PAGESIZE, ctypes.create_string_buffer(1)
    for at in (0, tensor.nbytes // 2, tensor.nbytes - 1):
        address = (tensor.data_ptr() + at) // page * page
        if mincore(ctypes.c_void_p(address), ctypes.c_size_t(page), seen) == 0 and not seen.raw[0] & 1:
            return False
    return True


def _whole_pages(weight: torch.Tensor | np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return address and length of the pages that a weight fills; no length if it is not contiguous."""
    if isinstance(weight, np.ndarray):
        at, contiguous = weight.ctypes.data, weight.flags.c_contiguous
    else:
        at, contiguous = weight.data_ptr(), weight.is_contiguous()
    if not contiguous:
        return 0, 0
    page = mmap.PAGESIZE
    begin = -(-at // page) * page
    return begin, (at + weight.nbytes) // page * page - begin


def _advise(weight: torch.Tensor | np.ndarray[Any, Any], advice: int) -> None:
    begin, length = _whole_pages(weight)
    if length > 0 and sys.platform == "linux":
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)  # an older kernel refuses, which costs nothing


def give_back_freed_memory() -> None:
    """Return freed heap to the system. glibc keeps whatever lies below a block in use, here the codes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
