"""The memory of a cache's layers, in which decode steps write.

Those of a DynamicCache get spare memory; transformers itself would copy them for every token. Those of a QINSCache and
of a StaticCache have some.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from ..nn import GrowingTokens
from .cache import QINSLayer
from .masks import mask_fits

Tensor = torch.Tensor
Store = tuple[int, int, int, int]  # kind and addresses, as _core.decode_layer takes them
Place = tuple[Store, Store, int, int]  # of keys, of values; the tokens that they have room for, and those in it

_ROOM = 64  # minimum number of spare tokens after growing


def _kind(x: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    return x.shape, x.dtype, None if mask is None else mask.dtype


class Room:
    """Memory in which a cache layer grows, and its state after the last step.

    Attributes:
        keys, values: (sequences, heads, size, head_dim).
        begin, end: range of tokens in the cache after the last step. Only a cache whose view ends at `end` may append,
            since copies of the cache may share the memory.

    """

    pages: tuple[int, int, int, int] = 0, 0, 0, 0  # not paged: see Pages

    def __init__(self, keys: Tensor, values: Tensor, end: int) -> None:
        self.keys, self.values, self.begin, self.end = keys, values, 0, end
        self.size, self.row_bytes = keys.shape[2], keys.shape[3] * keys.element_size()
        self.keys_at, self.values_at = keys.data_ptr(), values.data_ptr()
        self._left: tuple[Any, ...] = ()

    def __reduce__(self) -> Any:
        return type(None), ()  # a deep copy of a cache has tensors of its own, and no Room

    def stores(self) -> tuple[Store, Store]:
        """Return where keys and values are, from the first token of the view on."""
        offset = self.begin * self.row_bytes
        return (0, self.keys_at + offset, 0, 0), (0, self.values_at + offset, 0, 0)

    @property
    def left_by(self) -> Any:
        """The step that ran last; None before the first one."""
        return self._left[2] if self._left else None

    def ahead(self, kept: Any, step: object, x: Tensor, mask: Tensor | None) -> Place | None:
        """Return where a step can write the next token's states ahead of its turn; None if it must wait for it."""
        if self.end >= self.size or not self.is_as_left(kept, step, x, mask):
            return None
        keys, values = self.stores()
        return keys, values, self.size, self.end - self.begin

    def has(self, keys: Tensor, values: Tensor) -> bool:
        """Return whether these are the tensors that the last step left in the cache."""
        return bool(self._left) and self._left[0] is keys and self._left[1] is values

    def leave(self, kept: Any, step: object, x: Tensor, mask: Tensor | None, past: int) -> None:
        """Update a cache layer's views to include the tokens of x; a sliding window drops the oldest ones."""
        self.end = self.begin + past + x.shape[1]
        if isinstance(kept, DynamicSlidingWindowLayer):
            self.begin = max(self.begin, self.end - kept.sliding_window + 1)
            kept.cumulative_length += x.shape[1]
        count = self.end - self.begin
        kept.keys, kept.values = self.keys.narrow(2, self.begin, count), self.values.narrow(2, self.begin, count)
        self._left = kept.keys, kept.values, step, _kind(x, mask)

    def is_as_left(self, kept: Any, step: object, x: Tensor, mask: Tensor | None) -> bool:
        """Return whether a call continues the last one and is of the same kind, so that checks need not be repeated."""
        if not self._left or x.shape[1] != 1 or not mask_fits(mask, x, self.end - self.begin + 1):
            return False
        keys, values, last, kind = self._left
        same = keys is kept.keys and values is kept.values and last is step
        return same and kind == _kind(x, mask) and not getattr(kept, "record_past", False)


class CodedRoom:
    """The same of a QINSCache's layer."""

    pages: tuple[int, int, int, int] = 0, 0, 0, 0  # not paged: see Pages

    def __init__(self, tokens: GrowingTokens) -> None:
        self.tokens, self.version = tokens, tokens.version
        self._keys, self._values, self.size = tokens.stores
        self._left: tuple[Any, ...] = ()

    def __reduce__(self) -> Any:
        return type(None), ()

    def stores(self) -> tuple[Store, Store]:
        """Return where keys and values are."""
        return self._keys, self._values

    @property
    def left_by(self) -> Any:
        """The step that ran last; None before the first one."""
        return self._left[1] if self._left else None

    def ahead(self, kept: Any, step: object, x: Tensor, mask: Tensor | None) -> Place | None:
        """Return where a step can write the next token's states ahead of its turn; None if it must wait for it."""
        past = self.tokens.length
        if past >= self.size or not self.is_as_left(kept, step, x, mask):
            return None
        return self._keys, self._values, self.size, past

    def is_of(self, tokens: GrowingTokens) -> bool:
        """Return whether this is the present memory of a layer's tokens."""
        return self.tokens is tokens and self.version == tokens.version

    def leave(self, kept: Any, step: object, x: Tensor, mask: Tensor | None, past: int) -> None:
        """Count the tokens of x."""
        self.tokens.length = past + x.shape[1]
        self._left = self.tokens.length, step, _kind(x, mask)

    def is_as_left(self, kept: Any, step: object, x: Tensor, mask: Tensor | None) -> bool:
        """Return whether a call continues the last one and is of the same kind, so that checks need not be repeated."""
        past = self.tokens.length
        if x.shape[1] != 1 or not self.is_of(kept.tokens) or not mask_fits(mask, x, past + 1):
            return False
        return self._left == (past, step, _kind(x, mask))


class StaticRoom:
    """The same of a StaticCache's layer, which keeps its memory and counts its tokens itself."""

    pages: tuple[int, int, int, int] = 0, 0, 0, 0  # not paged: see Pages

    def __init__(self, kept: Any) -> None:
        self._keys, self._values, self.size = kept.keys, kept.values, kept.max_cache_len

    def stores(self) -> tuple[Store, Store]:
        """Return where keys and values are."""
        return (0, self._keys.data_ptr(), 0, 0), (0, self._values.data_ptr(), 0, 0)

    def leave(self, kept: Any, step: object, x: Tensor, mask: Tensor | None, past: int) -> None:
        """Count the tokens of x."""
        kept.cumulative_length.add_(x.shape[1])


class SlidingRoom(StaticRoom):
    """The same of one with a sliding window, which drops its first token for each new one when it is full."""

    def leave(self, kept: Any, step: object, x: Tensor, mask: Tensor | None, past: int) -> None:
        """Count the tokens of x, as transformers does: in the tensor only until the window is full."""
        if not is_full(kept):
            super().leave(kept, step, x, mask, past)
        kept.cumulative_length_int += x.shape[1]


def is_full(kept: Any) -> bool:
    """Return whether a StaticCache's sliding window has no room for another token."""
    return bool(kept.cumulative_length_int >= kept.max_cache_len)


def room_for(kept: Any, tokens: int) -> tuple[Room | CodedRoom | StaticRoom, int]:
    """Return memory with room for this many tokens after a cache layer's own, and the number of its own.

    A StaticCache's layer must have the room already, or be a full window, for one token.
    """
    if isinstance(kept, StaticSlidingWindowLayer):
        if not is_full(kept):
            return SlidingRoom(kept), kept.cumulative_length_int
        for states in (kept.keys, kept.values):
            assert states is not None
            states[:, :, :-1] = states[:, :, 1:].clone()
        return SlidingRoom(kept), kept.max_cache_len - 1
    if isinstance(kept, StaticLayer):
        return StaticRoom(kept), int(kept.cumulative_length)
    if isinstance(kept, QINSLayer):
        kept.tokens.reserve(tokens)
        if kept._qins_room is None or not kept._qins_room.is_of(kept.tokens):
            kept._qins_room = CodedRoom(kept.tokens)
        return kept._qins_room, kept.tokens.length
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
