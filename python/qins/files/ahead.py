"""Read-ahead of a checkpoint's tensors."""

from __future__ import annotations

import json
import mmap
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..system import is_resident, naming_file, page_in
from .direct import KNOWN, aligned_memory, blocks_around, read_directly
from .reading import Checkpoint

# Tensors of these sizes in bytes are read directly, others are mapped. Smaller ones gain too little from it, and three
# of the largest may be in memory at once.
_LEAST, _MOST = 1 << 20, 1 << 28


class ReadAhead:
    """Loads tensors of a checkpoint; another thread reads announced tensors ahead, in the order of their announcement.

    Floats are not needed again once they are encoded. So they bypass the page cache, unless it already holds them, and
    are read from disk into buffers that are reused.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._pool = ThreadPoolExecutor(1)
        self._coming: dict[str, Future[torch.Tensor]] = {}
        self._places: dict[Path, dict[str, int]] = {}
        self._rooms: list[mmap.mmap] = []  # buffers that no tensor uses

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._coming.clear()

    def announce(self, name: str) -> None:
        """Start reading a tensor that will be loaded once."""
        self._coming[name] = self._pool.submit(self._read, name)

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor, read or mapped."""
        coming = self._coming.pop(name, None)
        return self.checkpoint.load(name) if coming is None else coming.result()

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.load(name)
        if not self.checkpoint.mapped:
            return tensor
        suits = self.checkpoint.format == "safetensors" and _LEAST <= tensor.nbytes <= _MOST
        if KNOWN and suits and not is_resident(tensor):
            with suppress(OSError):  # then map the tensor, which works on every file system
                return self._read_directly(name, tensor)
        page_in(tensor)
        return tensor

    def _read_directly(self, name: str, mapped: torch.Tensor) -> torch.Tensor:
        path = self.checkpoint.where(name)
        if path not in self._places:
            self._places[path] = _places(path)
        begin = self._places[path][name]
        first, size = blocks_around(begin, mapped.nbytes)
        room = self._take(size)
        view = memoryview(room)
        weakref.finalize(view, self._rooms.append, room)  # the tensor refers to the view
        read_directly(path, begin, mapped.nbytes, view)
        return torch.frombuffer(view, dtype=mapped.dtype, count=mapped.numel(), offset=begin - first).view(mapped.shape)

    def _take(self, size: int) -> mmap.mmap:
        for i, room in enumerate(self._rooms):
            if len(room) >= size:
                return self._rooms.pop(i)
        self._rooms.clear()  # all are too small; buffers for the largest tensors are enough
        return aligned_memory(size)


def _places(path: Path) -> dict[str, int]:
    """Return the offset of each tensor in a safetensors file that the library has already validated."""
    with naming_file(path), path.open("rb") as f:
        header = f.read(int.from_bytes(f.read(8), "little"))
        start = f.tell()
    return {k: start + v["data_offsets"][0] for k, v in json.loads(header).items() if k != "__metadata__"}
