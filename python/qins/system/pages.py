"""Telling the system which pages are done with, and which come next."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def page_out(tensor: torch.Tensor) -> None:
    """Let the pages of a weight go that is in a mapped file; they would count as this process's until its end.

    MADV_PAGEOUT loses nothing: whoever still reads the tensor gets the pages back from the file.
    """
    _advise(tensor, 21)


def page_in(tensor: torch.Tensor) -> None:
    """Read a weight that is in a mapped file, where the kernel knows MADV_POPULATE_READ."""
    _advise(tensor, 22)


def is_resident(tensor: torch.Tensor) -> bool:
    """Whether a weight in a mapped file seems to be in memory: its first, its middle and its last page, on Linux.

    Of a file that this process may not write the kernel does not tell, and says yes.
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
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)  # an older kernel refuses: nothing is lost


def give_back_freed_memory() -> None:
    """Return freed heap to the system; glibc keeps what lies below any block still in use, here the codes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
