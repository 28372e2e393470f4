"""Where a model's codes are in memory."""

from __future__ import annotations

import torch
from torch import nn

from ..system import arena_for, give_back_freed_memory, page_out, rounded
from .coded import Coded

_AT_ONCE = 4 << 20  # bytes that are freed before the heap gives them back
_LEAST = 4096  # bytes of a tensor; scales of rows, for instance, are read once for many codes


def place_codes(model: nn.Module, *, from_file: bool) -> int:
    """Move a model's codes to huge pages where that is faster, see `qins.system.huge_pages`.

    Args:
        model: its codes must not be in use.
        from_file: they are mapped from a file, whose pages are given back.

    Returns:
        the number of bytes moved; 0 if none are.

    """
    found: dict[int, tuple[torch.Tensor, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for name in module._names if isinstance(module, Coded) else ():
            tensor = module._buffers[name]
            if tensor is not None and _may_move(tensor):  # once if modules share it
                found.setdefault(id(tensor), (tensor, []))[1].append((module, name))
    total = sum(rounded(t.nbytes) for t, _ in found.values())
    arena = arena_for(total)
    if arena is None:
        return 0
    freed = 0
    while found:
        old, places = found.pop(next(iter(found)))
        new = torch.from_numpy(arena.copy(old.view(torch.uint8).numpy())).view(old.dtype).reshape(old.shape)
        for module, name in places:
            module._buffers[name] = new
        if from_file:
            page_out(old)
        freed += old.nbytes
        del old
        if freed > _AT_ONCE:
            give_back_freed_memory()
            freed = 0
    return total


def _may_move(t: torch.Tensor) -> bool:
    plain = type(t) is torch.Tensor and t.is_cpu and t.is_contiguous() and not t.is_inference()
    return plain and t.nbytes >= _LEAST and not t.is_shared()  # type: ignore[no-untyped-call]
