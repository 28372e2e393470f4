"""Cosines and sines of rotary embedding, as decode steps take them."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
Rotation = tuple[int, int, int, int]  # addresses of cosines and sines, their number, and from a sequence to the next

NO_ROTATION: tuple[Rotation, Any] = (0, 0, 0, 0), ()

_last: tuple[Any, ...] = (None, None, None)


def rotation_for(rotation: tuple[Tensor, Tensor], dtype: torch.dtype, halves: bool) -> tuple[Rotation, Any]:
    """Prepare cosines and sines once for all layers.

    Returns:
        addresses of cosines and of sines, their number per token, and the stride between sequences; and the tensors
        that own the memory.

    """
    global _last
    given, of_dtype, found = _last  # read once: another thread may replace it
    if given is not rotation or of_dtype is not dtype:
        cos, sin = ((torch.cat((t, t), -1) if halves else t).to(dtype).contiguous() for t in rotation)
        next_sequence = cos.shape[1] * cos.shape[2] if cos.shape[0] > 1 else 0
        found = (cos.data_ptr(), sin.data_ptr(), cos.shape[2], next_sequence), (cos, sin)
        _last = rotation, dtype, found
    kept: tuple[Rotation, Any] = found
    return kept


def fits(rotation: Any, x: Tensor, head_dim: int) -> bool:
    """Return whether there are cosines and sines for each token, shared by all sequences or separate for each."""
    if not isinstance(rotation, tuple) or len(rotation) != 2 or not all(isinstance(t, Tensor) for t in rotation):
        return False
    cos, sin = rotation
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[1] != x.shape[1] or cos.shape[0] not in (1, x.shape[0]):
        return False
    n: int = cos.shape[2]
    return 0 < n <= head_dim and (n % 2 == 0 or n == head_dim)
