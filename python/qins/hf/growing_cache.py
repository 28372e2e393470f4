"""Spare memory for the layers of a DynamicCache, which transformers itself would copy for every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

Tensor = torch.Tensor

_ROOM = 64  # minimum number of spare tokens after growing


class Room:
    """Memory in which a cache layer grows, and its state after the last step.

    Attributes:
        keys, values: (sequences, heads, size, head_dim).
        begin, end: range of tokens in the cache after the last step. Only a cache whose view ends at `end` may append,
            since copies of the cache may share the memory.

    """

    def __init__(self, keys: Tensor, values: Tensor, end: int) -> None:
        self.keys, self.values, self.begin, self.end = keys, values, 0, end
        self.size, self.row_bytes = keys.shape[2], keys.shape[3] * keys.element_size()
        self.keys_at, self.values_at = keys.data_ptr(), values.data_ptr()
        self._left: tuple[Any, ...] = ()

    def __reduce__(self) -> Any:
        return type(None), ()  # a deep copy of a cache has tensors of its own, and no Room

    def has(self, keys: Tensor, values: Tensor) -> bool:
        """Return whether these are the tensors that the last step left in the cache."""
        return bool(self._left) and self._left[0] is keys and self._left[1] is values

    def leave(self, kept: Any, step: object, x: Tensor, past: int) -> None:
        """Update a cache layer's views to include the tokens of x; a sliding window drops the oldest ones."""
        self.end = self.begin + past + x.shape[1]
        if isinstance(kept, DynamicSlidingWindowLayer):
            self.begin = max(self.begin, self.end - kept.sliding_window + 1)
            kept.cumulative_length += x.shape[1]
        count = self.end - self.begin
        kept.keys, kept.values = self.keys.narrow(2, self.begin, count), self.values.narrow(2, self.begin, count)
        self._left = kept.keys, kept.values, step, x.shape, x.dtype

    def is_as_left(self, kept: Any, step: object, x: Tensor, mask: Tensor | None) -> bool:
        """Return whether a call continues the last one and is of the same kind, so that checks need not be repeated."""
        if mask is not None or not self._left or x.shape[1] != 1:
            return False
        _, _, last, shape, dtype = self._left
        same = last is step and x.shape == shape and x.dtype is dtype and self.has(kept.keys, kept.values)
        return same and not getattr(kept, "record_past", False)


def room_for(kept: Any, tokens: int) -> tuple[Room, int]:
    """Return memory with room for this many tokens after a cache layer's own, and the number of its own."""
    keys, values = kept.keys, kept.values
    past = keys.shape[2]
    room: Room | None = getattr(kept, "_qins_room", None)
    if room is not None and room.has(keys, values) and room.end + tokens <= room.size:
        return room, past
    size = past + tokens + max(past // 2, _ROOM)
    made = []
    for old in (keys, values):
        new = old.new_empty(*old.shape[:2], size, old.shape[3])
        new[:, :, :past] = old
        made.append(new)
    kept._qins_room = room = Room(made[0], made[1], past)
    return room, past
