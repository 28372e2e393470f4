"""QINSCache: a quantized KV cache for transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..nn import GrowingTokens, check_cache_codec, savings

try:
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError as e:  # pragma: no cover - depends on the environment
    raise ImportError("QINSCache needs transformers: pip install 'qins[hf]'") from e

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


class QINSLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The quantized keys and values of one layer."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, k_codec: str = "float16", v_codec: str = "log8") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = GrowingTokens(k_codec, v_codec)
        self._qins_room: Any = None  # see growing_cache.py

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Record the dtype and device; the first update allocates memory."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape (batch, heads, tokens, head_dim); return all cached ones, dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.tokens.append(key_states, value_states)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return length and offset of what the mask covers; transformers 4 passes the positions of the queries."""
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.tokens.length + queries, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        return self.tokens.length

    def get_max_length(self) -> int:
        """Return -1, for no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1, for no limit; transformers 4 uses this name."""
        return -1

    def reset(self) -> None:
        """Remove all tokens."""
        self.tokens.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -n tokens or, for a positive n (transformers 4), those from n on."""
        n = tokens_to_remove
        self.tokens.crop(n if n > 0 else max(0, self.tokens.length + n))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search."""
        self.tokens.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self.tokens.select(torch.arange(self.tokens.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, given by indices or a boolean mask."""
        self.tokens.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        """Do nothing: codes are on the CPU already."""

    def prefetch(self) -> None:
        """Do nothing."""


class QINSCache(Cache):
    """A transformers KV cache with quantized values and, on request, quantized keys.

    Use it as `model.generate(..., past_key_values=qins.QINSCache(model.config))`.

    Args:
        config: the model's config; None if every layer has ordinary attention. Sliding-window layers keep all their
            tokens.
        v_codec: codec of the values: "log8" (1 byte per element), "log6", "log5" or "log4" (6, 5 or 4 bits), "golden"
            (2 bytes) or "float16".
        k_codec: codec of the keys, likewise. Keys determine the attention weights and tolerate less than values.

    Raises:
        ValueError: the codec is unknown, or the model has layers other than attention. The first update raises it if
            log6, log5 or log4 gets heads whose number of elements is not a multiple of 8.

    """

    def __init__(self, config: Any = None, *, v_codec: str = "log8", k_codec: str = "float16") -> None:
        if config is not None:
            types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
            other = sorted(set(types) - set(_ATTENTION))
            if other:
                raise ValueError(f"config: expected attention layers only, got {', '.join(other)}")
        self.k_codec, self.v_codec = check_cache_codec("k_codec", k_codec), check_cache_codec("v_codec", v_codec)
        super().__init__(layer_class_to_replicate=partial(QINSLayer, self.k_codec, self.v_codec))  # type: ignore[arg-type]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1, for no limit, even before the first update."""
        return -1

    def memory_savings(self) -> dict[str, float]:
        """Return the bytes of the cached tokens, the bytes in float16 and in float32, and the ratios."""
        parts = [layer.tokens.savings() for layer in self.layers if isinstance(layer, QINSLayer)]
        return savings(sum(p[0] for p in parts), sum(p[1] for p in parts), sum(p[2] for p in parts))
