"""Decode steps: decoder layers that run in one call of the core each, for the few tokens per call of decoding.

The layers of most language models differ in a few choices only: which norms there are, whether projections are fused,
how activations are gated. `describe` reads these choices off a layer's modules. A layer with anything else keeps its
own forward, and so does every call that is not decoding on the CPU. A step is verified against the layer's own forward,
once for each kind of call, and is dropped if the two differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .. import _core
from ..codec import DTYPE_NUMBER, LOG_BITS
from ..system import get_num_threads, switch
from . import ahead, paging
from .cache import QINSCache, QINSLayer
from .fused import fuse
from .growing_cache import CodedRoom, Room, is_full, room_for
from .layer_description import LayerDescription, describe, mlp_of
from .masks import mask_fits, mask_for
from .paging import Pages, is_paged, pages_of
from .replacing import TOLERANCE, Replacement, UnfitError, agree, agree_as_sums, may_replace, replace
from .rotation import NO_ROTATION, fits, rotation_for

Tensor = torch.Tensor

# Maximum number of tokens of a step, over all sequences; larger calls, most of them prompts, run the modules.
MOST_ROWS = 16
# Tolerance for keys in log8, log6, log5 or log4, or values in log8. Scores are then products in fixed point, exact to
# about 1e-4 of the largest, and softmax may magnify that; values in log8 are in fixed point, too.
_OF_CODES = 1e-3
_CACHES = (DynamicCache, QINSCache, StaticCache)
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, QINSLayer, StaticLayer, StaticSlidingWindowLayer)
_OF_STATIC = ("keys", "values", "cumulative_length")  # tensors that a StaticLayer writes to
# Arguments that a step accepts; a call with any other truthy argument runs the modules.
_KNOWN = {"attention_mask", "position_embeddings", "position_ids", "past_key_values", "use_cache", "cache_position"}


class LayerStep(Replacement):
    """Runs a decoder layer in one call of the core.

    Attributes:
        layer, about: the layer and its description, once they are needed.
        leads: whether the layer gets other arguments than the one before it, and so cannot run ahead with it.
        chain: the layers that run ahead with this one.

    """

    key = "_qins_step"

    def __init__(self) -> None:
        self.layer: Any = None
        self.about: LayerDescription | None = None
        self.leads = False
        self.chain: ahead.Chain | None = None
        self._proved: set[tuple[Any, ...]] = set()
        self._in_tuple = False

    def without(self, module: Any) -> str:
        """Return what happens without this, for the log."""
        return f"layer {module.self_attn.layer_idx} decodes with its own modules"

    def run(self, layer: Any, own: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        """Return what the layer returns, or None if the caller must run the layer's own forward.

        Raises:
            UnfitError: the core cannot compute this layer at all.

        """
        cache = given.get("past_key_values")
        paged = cache is None and is_paged(given.get("cache"))
        if not paged and type(cache) not in _CACHES:
            return None
        if not paged and (found := ahead.take(self, cache, x, given)) is not None:
            return (found,) if self._in_tuple else found
        if layer.training or not may_replace():
            return None
        mask, rotation = given.get("attention_mask"), given.get("position_embeddings")
        for name, value in given.items():
            if name not in _KNOWN and not (paged and name in paging.NAMES) and value:
                return None
        about = self.about
        if about is None or self.layer is not layer or not about.is_current():
            if x.dim() != 3 or x.shape[0] * x.shape[1] > MOST_ROWS:  # a prefill: the step may never be needed
                return None
            self._proved.clear()
            self.layer, self.about = layer, (about := describe(layer))
        if about.is_observed() or (about.rotates and type(rotation) is not tuple):
            return None
        kept: Any
        if paged:
            kept = pages_of(given, about.index, x)
        else:
            assert cache is not None
            kept = cache.layers[about.index] if about.index < len(cache.layers) else None
        room: Room | CodedRoom | None = getattr(kept, "_qins_room", None)
        if room is None or not room.is_as_left(kept, self, x, mask):
            kind = _kind(about, kept, x, mask, rotation)
            if kind is None:
                return None
            if kind not in self._proved:
                return self._prove(about, own, x, given, kept, kind)
        elif about.rest is None and (found := ahead.run_ahead(self, cache, x, given)) is not None:
            return (found,) if self._in_tuple else found
        called = self._call(about, x, kept, mask, rotation)
        if called is None:
            return None
        y = self._finish(about, called)
        return (y,) if self._in_tuple else y

    def _finish(self, about: LayerDescription, x: Tensor) -> Tensor:
        """Run the part of the layer after attention that the core does not support, if there is one."""
        if about.rest is None:
            return x
        modules = self.layer._modules
        before, after = (modules[n] if n else None for n in about.rest)
        y = modules[about.mlp](x if before is None else before(x))
        y = y[0] if isinstance(y, tuple) else y  # drop the router's output
        y = y if after is None else after(y)
        result: Tensor = x + (y if about.residual == 1.0 else y * about.residual)
        return result

    def _prove(
        self, about: LayerDescription, own: Callable[..., Any], x: Tensor, given: dict[str, Any], kept: Any, kind: Any
    ) -> Any:
        """Return the layer's own result; if the step's agrees, use the step for this kind of call from now on."""
        other = _copy(kept)
        result = self._by_modules(about, own, x, given, other)
        if isinstance(kept, Pages):  # which the modules have written to themselves
            other = _states(kept)
        self._in_tuple = isinstance(result, tuple)
        want = result[0] if isinstance(result, tuple) else result
        if isinstance(result, tuple) and len(result) != 1:
            raise UnfitError("it returns more than hidden states")
        if not bool(torch.isfinite(want).all()):  # NaN or infinity cannot be compared
            _restore(kept, other)
            return result
        mask, rotation = given.get("attention_mask"), given.get("position_embeddings")
        called = self._call(about, x, kept, mask, rotation)
        if called is None:  # its products, unlike the modules', are too large for the cache
            _restore(kept, other)
            return result
        got, again, tolerance = self._finish(about, called), result, TOLERANCE[x.dtype]
        if isinstance(kept, QINSLayer):
            coded = _Coded(kept)
            again = self._by_modules(about, own, x, given, coded)
            agreed = coded.is_as_good_as(other, tolerance)
            if kept.tokens.k_codec in LOG_BITS or kept.tokens.v_codec == "log8":
                tolerance = max(tolerance, _OF_CODES)
        else:
            states = zip(_states(kept), _states(other), strict=True)
            agreed = all(agree(a, b, tolerance) for a, b in states)
        want = again[0] if self._in_tuple else again
        if not agreed or not agree_as_sums(got, want, x, tolerance):
            _restore(kept, other)
            self.give_up(self.layer, "its results differ")
            return result
        self._proved.add(kind)
        return again

    def _by_modules(
        self, about: LayerDescription, own: Callable[..., Any], x: Tensor, given: dict[str, Any], kept: Any
    ) -> Any:
        """Return the layer's own result with another cache layer in its place."""
        if isinstance(kept, Pages):
            return own(self.layer, x, **given)
        beside = copy.copy(given["past_key_values"])
        beside.layers = [*beside.layers]
        beside.layers[about.index] = kept
        return own(self.layer, x, **{**given, "past_key_values": beside})

    @property
    def description(self) -> LayerDescription:
        """The layer's description, which there must be."""
        assert self.about is not None
        return self.about

    def may_follow(self, leading: LayerStep, distance: int) -> bool:
        """Return whether the layer can run ahead, this many layers after a leading one."""
        first, about, layer = leading.description, self.about, self.layer
        if about is None or self.leads or about.rest is not None or about.index != first.index + distance:
            return False
        if layer.training or layer.__dict__.get(self.key) is not self or about.config is not first.config:
            return False
        alike = (about.hidden, about.halves) == (first.hidden, first.halves)
        return alike and about.is_current() and not about.is_observed()

    def _call(self, about: LayerDescription, x: Tensor, kept: Any, mask: Tensor | None, rotation: Any) -> Tensor | None:
        """Return the hidden states after what the core computes; None if a quantized cache cannot hold its states."""
        paged = isinstance(kept, Pages)
        sequences, tokens = (x.shape[1], 1) if paged else x.shape[:2]  # of each request one token
        x = x.contiguous()
        y = torch.empty_like(x)
        room, past = (kept, 0) if paged else room_for(kept, tokens)
        (cos_at, sin_at, rotary_dim, rotary_next), _in_use = NO_ROTATION
        if about.rotates:
            (cos_at, sin_at, rotary_dim, rotary_next), _in_use = rotation_for(rotation, x.dtype, about.halves)
        if paged:  # whose mask only separates requests
            mask = None
        keys, values = room.stores()
        finite = _core.decode_layer(
            about.core, DTYPE_NUMBER[x.dtype], x.data_ptr(), y.data_ptr(), sequences, tokens,
            keys[1], values[1], room.size, past,
            cos_at, sin_at, rotary_dim, rotary_dim if paged else rotary_next,
            *mask_for(mask),
            get_num_threads(), keys[0], keys[2], keys[3], values[0], values[2], values[3], *room.pages,
        )  # fmt: skip
        if not finite:
            return None
        room.leave(kept, self, x, mask, past)
        return y


class _Coded(QINSLayer):  # type: ignore[no-untyped-call]
    """A cache layer that already has the codes of the next tokens.

    A difference in rounding may change a code to its neighbor. Results are compared with the same codes, because a
    neighbor changes them by more than rounding does: at 4 bits, by a tenth.
    """

    def __init__(self, kept: QINSLayer) -> None:
        self.__dict__.update(kept.__dict__)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all cached states, dequantized."""
        self._given = key_states, value_states
        return self.tokens.read(key_states.dtype, value_states.dtype)

    def is_as_good_as(self, other: QINSLayer, tolerance: float) -> bool:
        """Return whether the codes are as near to the states that update was given as another layer's codes are."""
        for mine, others, given in zip(_states(self), _states(other), self._given, strict=True):
            error, its_error = ((t[:, :, -given.shape[2] :] - given.float()).norm() for t in (mine, others))
            if not error <= 1.1 * its_error + tolerance * given.float().norm():
                return False
        return True


def _copy(kept: Any) -> Any:
    """Return a copy of a cache layer, to which both may append."""
    other = copy.copy(kept)
    if isinstance(kept, QINSLayer):
        other.tokens = copy.deepcopy(kept.tokens)
    elif isinstance(kept, StaticLayer):
        for name in _OF_STATIC:
            setattr(other, name, getattr(kept, name).clone())
    return other


def _restore(kept: Any, other: Any) -> None:
    """Make a cache layer what its copy has become."""
    if isinstance(kept, Pages):
        kept.put(other)
    elif isinstance(kept, StaticLayer):  # whose tensors stay where they are
        for name in _OF_STATIC:
            getattr(kept, name).copy_(getattr(other, name))
        kept.__dict__.update({n: v for n, v in other.__dict__.items() if n not in _OF_STATIC})
    else:
        kept.__dict__.update(other.__dict__)


def _states(kept: Any) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a cache layer, or those of a paged cache's new tokens."""
    if isinstance(kept, Pages):
        return kept.new_states()
    if isinstance(kept, tuple):  # which were those
        return kept
    if isinstance(kept, QINSLayer):
        return kept.tokens.read(torch.float32, torch.float32)
    return kept.keys, kept.values


def _kind(about: LayerDescription, kept: Any, x: Tensor, mask: Any, rotation: Any) -> tuple[Any, ...] | None:
    """Return the kind of call, each of which is verified once, or None if the layer's own forward must run."""
    if not (type(kept) in _LAYERS or isinstance(kept, Pages)) or getattr(kept, "record_past", False):
        return None
    if x.dim() != 3 or x.dtype not in TOLERANCE or not x.is_cpu or x.shape[0] * x.shape[1] > MOST_ROWS:
        return None
    if x.shape[2] != about.hidden:
        return None
    if isinstance(kept, Pages):
        if not kept.fit(x, (about.kv_heads, about.head_dim)):
            return None
    else:
        keys = _attended(kept, x, (x.shape[0], about.kv_heads, about.head_dim))
        if keys == 0 or not mask_fits(mask, x, keys):
            return None
    if mask is None and isinstance(kept, StaticLayer):  # the modules would attend to what is not written yet
        return None
    if about.rotates and not fits(rotation, x, about.rotary_most):
        return None
    codecs = (kept.tokens.k_codec, kept.tokens.v_codec) if isinstance(kept, QINSLayer) else ()
    full = isinstance(kept, StaticSlidingWindowLayer) and is_full(kept)
    return x.dtype, x.shape[0] > 1, x.shape[1] > 1, None if mask is None else mask.dtype, type(kept), codecs, full


def _attended(kept: Any, x: Tensor, wanted: tuple[int, int, int]) -> int:
    """Return the number of keys that a mask covers, or 0 if the core cannot use a cache layer.

    `wanted` has the sequences, heads and elements of a head. A StaticCache's masks cover all its memory. An empty cache
    is for the modules: a prompt's padding sees no key at all, which they and the core answer differently.
    """
    if isinstance(kept, QINSLayer):
        length = kept.tokens.length
        return length + x.shape[1] if length > 0 and kept.tokens.shapes == (wanted, wanted) else 0
    keys, values = kept.keys, kept.values
    if not kept.is_initialized or keys is None or keys.dim() != 4 or keys.dtype != x.dtype or values.dtype != x.dtype:
        return 0
    sequences, heads, size, head_dim = keys.shape
    if keys.shape != values.shape or (sequences, heads, head_dim) != wanted:
        return 0
    if not isinstance(kept, StaticLayer):
        return size + x.shape[1] if size > 0 else 0
    # older transformers do not count
    if isinstance(kept, StaticSlidingWindowLayer):
        written = getattr(kept, "cumulative_length_int", None)
        has_room = isinstance(written, int) and (
            0 < written <= size - x.shape[1] or (is_full(kept) and x.shape[1] == 1)
        )
    else:
        written = getattr(kept, "cumulative_length", None)
        has_room = isinstance(written, Tensor) and 0 < int(written) <= size - x.shape[1]
    return size if has_room and keys.is_contiguous() and values.is_contiguous() else 0


def decode_in_steps(model: nn.Module) -> None:
    """Enable decode steps in a model's decoder layers, and fused operations where they run their own forward.

    The environment variable QINS_DECODE_STEP=0 prevents it.

    Raises:
        ValueError: QINS_DECODE_STEP is neither 0 nor 1.

    """
    if not switch("QINS_DECODE_STEP", True):
        return
    for module in model.modules():
        fuse(module)
        if "self_attn" in module._modules and mlp_of(module) in module._modules:
            replace(module, LayerStep())
