"""The paged cache of transformers' continuous batching, as decode steps read and write it: in place, without a copy."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .growing_cache import Store

Tensor = torch.Tensor

# What continuous batching passes to decoder layers beyond what `generate` does.
NAMES = {"cache", "read_index", "write_index", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
         "block_table", "is_causal", "logits_indices", "logits_processor_args"}  # fmt: skip


class Pages:
    """Where a layer's keys and values are, for a call with one new token for each of several requests.

    Attributes:
        keys, values: (slots, heads, head_dim); a slot is what one token has.
        slot: the slots of all requests' tokens, the new one last in each request's.
        begin: (requests + 1); where each request's slots begin.

    """

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor, begin: Tensor) -> None:
        self.keys, self.values, self.slot, self.begin = keys, values, slot, begin

    def fit(self, x: Tensor, shape: tuple[int, int]) -> bool:
        """Return whether the core can use these pages; shape: number of heads, and of elements of a head."""
        for states in (self.keys, self.values):
            if states.dtype is not x.dtype or states.shape[1:] != shape or not states.is_contiguous():
                return False
        slot, begin = self.slot, self.begin
        if slot.dtype is not torch.int64 or begin.dtype is not torch.int32 or len(begin) != x.shape[1] + 1:
            return False
        return len(slot) > 0 and slot.is_contiguous() and begin.is_contiguous()

    # As of a Room, see growing_cache.

    size = 0

    def stores(self) -> tuple[Store, Store]:
        """Return where keys and values are."""
        return (0, self.keys.data_ptr(), 0, 0), (0, self.values.data_ptr(), 0, 0)

    @property
    def pages(self) -> tuple[int, int, int, int]:
        """Where each request's tokens are, as `_core.decode_layer` takes it."""
        slots = min(len(self.keys), len(self.values))
        return self.slot.data_ptr(), self.begin.data_ptr(), len(self.slot), slots

    def leave(self, kept: Any, step: object, x: Tensor, mask: Tensor | None, past: int) -> None:
        """Do nothing: transformers counts the tokens."""

    # For verifying a step: the modules write to the same cache.

    def new_states(self) -> tuple[Tensor, Tensor]:
        """Return copies of the new tokens' keys and values."""
        at = self.slot[self.begin[1:].long() - 1]
        return self.keys[at], self.values[at]

    def put(self, states: tuple[Tensor, Tensor]) -> None:
        """Overwrite the new tokens' keys and values."""
        at = self.slot[self.begin[1:].long() - 1]
        self.keys[at], self.values[at] = states


def is_paged(cache: Any) -> bool:
    """Return whether this is a paged cache; if so, transformers' module with its class has been imported."""
    module = sys.modules.get("transformers.generation.continuous_batching.cache")
    return module is not None and type(cache) is module.PagedAttentionCache


def pages_of(given: dict[str, Any], index: int, x: Tensor) -> Pages | None:
    """Return the pages of a call, or None if they are not such that each request has one new token.

    Args:
        given: the layer's arguments, with a paged cache.
        index: the layer's index in the cache.
        x: hidden states, (1, tokens of all requests, hidden).

    """
    from transformers.generation.continuous_batching.cache_allocators.full_attention import FullAttentionCacheAllocator
    from transformers.generation.continuous_batching.cache_allocators.sliding_attention import (
        SlidingAttentionCacheAllocator,
    )

    allocator = given["cache"].layer_to_allocator.get(index)
    slides = type(allocator) is SlidingAttentionCacheAllocator
    if not (slides or type(allocator) is FullAttentionCacheAllocator) or given.get("block_table") is not None:
        return None
    if given.get("max_length_q") != 1 or len(x) != 1 or len(given["cu_seq_lens_q"]) != x.shape[1] + 1:
        return None
    slot, begin = given["read_index"][allocator.index], given["cu_seq_lens_k"][allocator.layer_type]
    if slides and len(slot) > 0:
        slot = _with_new(given, allocator.index, slot, begin)
    keys, values = allocator._kv_token_views[index]
    return Pages(keys, values, slot, begin)


_last_slots: tuple[Any, dict[int, Tensor]] = (None, {})


def _with_new(given: dict[str, Any], index: int, slot: Tensor, begin: Tensor) -> Tensor:
    """Return the slots of a layer with a sliding window with those of the new tokens, which transformers writes last.

    A new token takes the slot of the one that has just left the window. Made once for all layers.
    """
    global _last_slots
    call, found = _last_slots  # read once: another thread may replace it
    if call is not given["read_index"]:
        call, found = given["read_index"], {}
        _last_slots = call, found
    if index not in found:
        filled = slot.clone()
        filled[begin[1:].long() - 1] = given["write_index"][index]
        found[index] = filled
    return found[index]
