"""Advice to the system: which pages are no longer needed, and which come next."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def page_out(tensor: torch.Tensor) -> None:
    """Release the pages of a weight in a mapped file, which would otherwise count as this process's until it exits.

    MADV_PAGEOUT loses nothing: a later read of the tensor brings the pages back from the file.
    """
    _advise(tensor, 21)


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


def _advise(tensor: torch.Tensor, advice: int) -> None:
    if sys.platform != "linux" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - begin
    if length > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)  # an older kernel refuses, which costs nothing


def give_back_freed_memory() -> None:
    """Return freed heap to the system. glibc keeps whatever lies below a block in use, here the codes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
