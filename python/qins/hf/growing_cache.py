"""Memory in which the layers of a DynamicCache grow: transformers' own are copied for every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

Tensor = torch.Tensor

_ROOM = 64  # tokens that there is room for at least after growing


class Room:
    """Memory that a cache's layer grows in, and how the last step left it.

    Attributes:
        keys, values: (sequences, heads, size, head_dim).
        begin, end: the tokens of the last step's cache. Who appends must have a view that ends there, since others may
            share the memory.

    """

    def __init__(self, keys: Tensor, values: Tensor, end: int) -> None:
        self.keys, self.values, self.begin, self.end = keys, values, 0, end
        self.size, self.row_bytes = keys.shape[2], keys.shape[3] * keys.element_size()
        self.keys_at, self.values_at = keys.data_ptr(), values.data_ptr()
        self._left: tuple[Any, ...] = ()

    def __reduce__(self) -> Any:
        return type(None), ()  # a copied cache has its own memory, and none of ours

    def has(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are what the last step left."""
        return bool(self._left) and self._left[0] is keys and self._left[1] is values

    def leave(self, kept: Any, step: object, x: Tensor, past: int) -> None:
        """Let a cache's layer have the tokens that are there now, x's among them."""
        self.end = self.begin + past + x.shape[1]
        if isinstance(kept, DynamicSlidingWindowLayer):
            self.begin = max(self.begin, self.end - kept.sliding_window + 1)
            kept.cumulative_length += x.shape[1]
        count = self.end - self.begin
        kept.keys, kept.values = self.keys.narrow(2, self.begin, count), self.values.narrow(2, self.begin, count)
        self._left = kept.keys, kept.values, step, x.shape, x.dtype

    def is_as_left(self, kept: Any, step: object, x: Tensor, mask: Tensor | None) -> bool:
        """Whether a call is one more like the last, of whose kind of call nothing needs to be looked at again."""
        if mask is not None or not self._left or x.shape[1] != 1:
            return False
        _, _, last, shape, dtype = self._left
        same = last is step and x.shape == shape and x.dtype is dtype and self.has(kept.keys, kept.values)
        return same and not getattr(kept, "record_past", False)


def room_for(kept: Any, tokens: int) -> tuple[Room, int]:
    """Memory with room for so many more tokens behind those of a cache's layer, and how many these are."""
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
