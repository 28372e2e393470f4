"""Attention masks, as decode steps take them."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


def mask_for(mask: Tensor | None) -> tuple[int, int, int, int]:
    """Return a mask's address, whether it is bool, and the strides between sequences and between queries."""
    if mask is None:
        return 0, 0, 0, 0
    return mask.data_ptr(), int(mask.dtype == torch.bool), mask.stride(0) if len(mask) > 1 else 0, mask.stride(2)


def mask_fits(mask: Any, x: Tensor, total: int) -> bool:
    """Return whether a mask fits sequences, queries and keys; without a mask, each sequence must have one query."""
    if mask is None:
        return x.shape[1] == 1
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype not in (torch.bool, x.dtype):
        return False
    return mask.shape[1:] == (1, x.shape[1], total) and mask.shape[0] in (1, len(x)) and mask.stride(3) == 1
