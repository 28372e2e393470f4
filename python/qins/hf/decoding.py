"""Decoder layers in one call of the core each, for the few tokens at a time that generation adds.

Most language models have the same layers but for a few choices: which norms there are, whether projections are fused,
how activations are gated. `LayerStep` reads these choices off a layer's modules. A layer with anything else keeps its
own forward, and so does every call that is not decoding on the CPU. Before a step is trusted, it runs beside the
layer's own forward, once for each kind of call, and is dropped if the two differ.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .. import _core
from ..nn import QINSLinear, numbers_of
from ..system import threads

logger = logging.getLogger("qins")

Tensor = torch.Tensor

# Tokens of one call, over all sequences; more go through the modules.
MOST_ROWS = 16
_MOST_HEAD_DIM = 512
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# How far a step may be from the modules, which round to the dtype after each operation.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ROOM = 64  # tokens that a cache has room for at least when it grows

# Layers whose source has been read: what depends on a position, say, no comparison of a few tokens would show.
_FAMILIES = {
    f"{family}DecoderLayer"
    for family in (
        "Gemma", "Gemma2", "Gemma3", "GptOss", "Granite", "GraniteMoe", "Llama", "Mistral", "Mixtral", "Olmo2", "Olmo3",
        "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "SeedOss", "SmolLM3",
    )
}  # fmt: skip
# Names of a layer's norms: before attention, after it, before the MLP, after it.
_NORMS: dict[frozenset[str], tuple[str | None, ...]] = {
    frozenset({"input_layernorm", "post_attention_layernorm"}): (
        "input_layernorm", None, "post_attention_layernorm", None,
    ),
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    ): ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    frozenset({"post_attention_layernorm", "post_feedforward_layernorm"}): (
        None, "post_attention_layernorm", None, "post_feedforward_layernorm",
    ),
}  # fmt: skip
# What a call may say besides what is looked at; anything else that says something goes to the modules.
_KNOWN = {"attention_mask", "position_embeddings", "position_ids", "past_key_values", "use_cache", "cache_position"}


class _UnfitError(Exception):
    """A layer computes something that the core's does not."""


def _norm(norm: nn.Module | None) -> tuple[Tensor | None, float]:
    """Weight, in float32, and epsilon of a root mean square norm."""
    if norm is None:
        return None, 0.0
    weight = norm._parameters.get("weight")
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or epsilon is None or len([*norm.parameters()]) != 1:
        raise _UnfitError(f"a {type(norm).__name__}")
    x = torch.linspace(-1.0, 2.0, weight.numel())
    scaled = x * torch.rsqrt(x.square().mean() + epsilon)
    with torch.no_grad():
        own = copy.copy(norm)  # as a dictionary: nothing of the module is changed
        own.__dict__["_parameters"] = {"weight": nn.Parameter(weight.float(), requires_grad=False)}
        got = type(norm).forward(own, x)
        for factor in (weight.float(), 1.0 + weight.float()):
            if got.shape == x.shape and torch.allclose(got.float(), scaled * factor, rtol=1e-5, atol=1e-6):
                return factor.detach().clone(), float(epsilon)
    raise _UnfitError(f"a {type(norm).__name__}")


def _activation(act: Any) -> int:
    x = torch.linspace(-6.0, 6.0, 101)
    known = nn.functional.silu(x), nn.functional.gelu(x, approximate="tanh")
    for number, y in enumerate(known):
        if torch.allclose(act(x), y, rtol=1e-6, atol=1e-7):
            return number
    raise _UnfitError(f"the activation {type(act).__name__}")


def _harmless(module: nn.Module) -> bool:
    return isinstance(module, (nn.Dropout, nn.Identity)) or not ([*module.parameters()] or module._modules)


class LayerStep:
    """A decoder layer in one call of the core, described when it is first needed. A copied or pickled one is empty."""

    def __init__(self) -> None:
        self._layer: Any = None
        self._proved: set[tuple[Any, ...]] = set()

    def __reduce__(self) -> Any:
        return type(self), ()

    def _build(self, layer: Any) -> None:
        """Describe a layer.

        Raises:
            _UnfitError: it is not one that the core knows.

        """
        if type(layer).__name__ not in _FAMILIES or not type(layer).__module__.startswith("transformers.models."):
            raise _UnfitError(f"a {type(layer).__name__}")
        attention, self._mlp = layer.self_attn, _mlp_of(layer)
        mlp = layer._modules[self._mlp]
        self._config, self._implementation = attention.config, attention.config._attn_implementation
        if self._implementation not in ("sdpa", "eager"):
            raise _UnfitError(f"attention by {self._implementation}")
        self._watched: list[tuple[dict[str, Any], str, Any]] = []
        self._versions: list[tuple[Tensor, int]] = []  # of tensors that are copied, which changing them in place ups
        self._modules: list[nn.Module] = [attention]
        self._kept: list[Tensor] = []
        used: set[int] = set()

        def child(parent: nn.Module, name: str | None) -> nn.Module | None:
            found = parent._modules.get(name) if name else None
            if found is not None:
                self._watched.append((parent._modules, str(name), found))
                self._modules.append(found)
            return found

        def floats(owner: nn.Module, name: str, value: Tensor | None) -> int:
            """The address of float32 numbers that stand for a parameter."""
            if value is None:
                return 0
            original: Any = owner._parameters[name]
            if original.is_inference():  # whose changes nobody counts
                raise _UnfitError(f"{name} is an inference tensor")
            self._watched.append((owner._parameters, name, original))
            self._versions.append((original, original._version))
            used.add(id(original))
            kept = value.detach().float().contiguous().clone()
            self._kept.append(kept)
            return kept.data_ptr()

        def product(parent: nn.Module, name: str) -> tuple[int, ...] | None:
            linear = child(parent, name)
            if linear is None:
                return None
            if type(linear) is not QINSLinear or linear._non_persistent_buffers_set:
                raise _UnfitError(f"{name} is a {type(linear).__name__}")
            fields: list[Any] = [linear._buffers[n] for n in linear._names]
            numbers = numbers_of(fields, linear.codec, linear.group_size)
            if numbers is None:
                raise _UnfitError(f"{name} is not on the CPU, or not contiguous")
            for buffer in linear._names:
                self._watched.append((linear._buffers, buffer, linear._buffers[buffer]))
                used.add(id(linear._buffers[buffer]))
            bias = linear._parameters["bias"]
            return (*numbers, floats(linear, "bias", bias))

        def norm(parent: nn.Module, name: str | None) -> tuple[int, float]:
            module = child(parent, name)
            weight, epsilon = _norm(module)
            return (floats(module, "weight", weight), epsilon) if module is not None else (0, 0.0)

        names = {n for n, m in layer._modules.items() if m is not None and not _harmless(m)}
        found = _NORMS.get(frozenset(names - {"self_attn", self._mlp}))
        if found is None:
            raise _UnfitError(f"its modules {', '.join(sorted(names))}")
        # what is no plain MLP, such as a mixture of experts, runs as it is, after attention
        inside = {n for n, m in mlp._modules.items() if not _harmless(m)}
        plain = inside in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
        self._after = None if plain else found[2:]
        if plain:
            self._modules.append(mlp)
        norms = [norm(layer, n) for n in (found if plain else found[:2])] + ([] if plain else [(0, 0.0)] * 2)
        heads = [norm(attention, n) for n in ("q_norm", "k_norm")]
        sinks = attention._parameters.get("sinks")
        sinks_at = floats(attention, "sinks", sinks) if sinks is not None else 0
        self._halves = sinks is not None  # GPT-OSS, whose rotations are told once for both halves of a head
        fused = "qkv_proj" in attention._modules, "gate_up_proj" in inside
        of_qkv = ("qkv_proj", "", "") if fused[0] else ("q_proj", "k_proj", "v_proj")
        of_mlp = ("gate_up_proj", "", "down_proj") if fused[1] else ("gate_proj", "up_proj", "down_proj")
        qkv, o = [product(attention, n) for n in of_qkv], product(attention, "o_proj")
        gates = [product(mlp, n) if plain else None for n in of_mlp]
        if None in (qkv[0], o) or fused[0] != (qkv[1] is None) or fused[0] != (qkv[2] is None):
            raise _UnfitError("a projection that is not there")
        dim, hidden = int(attention.head_dim), attention.o_proj.out_features
        count = attention.o_proj.in_features // dim
        width = (attention.qkv_proj if fused[0] else attention.q_proj).out_features
        kv_count = (width // dim - count) // 2 if fused[0] else attention.k_proj.out_features // dim
        inner = mlp.down_proj.in_features if plain else 0
        fits = width == (count + 2 * kv_count if fused[0] else count) * dim
        if plain:
            made = (mlp.gate_up_proj if fused[1] else mlp.gate_proj).out_features
            fits = fits and made == inner * (2 if fused[1] else 1)
        if not fits or dim > _MOST_HEAD_DIM or dim % 2 or kv_count < 1 or count % kv_count:
            raise _UnfitError("its sizes")
        of_heads = heads[0][0] and attention.q_norm.weight.numel() == dim
        sizes = (hidden, count, kv_count, dim, inner, int(bool(of_heads)), _activation(_act(mlp)) if plain else 0)
        epsilons = {e for w, e in norms if w}, {e for w, e in heads if w}
        if any(len(e) > 1 for e in epsilons):
            raise _UnfitError("norms that differ")
        self._residual = float(getattr(layer, "residual_multiplier", 1.0))
        numbers = (
            *(next(iter(e), 0.0) for e in epsilons),
            float(attention.scaling),
            # which SDPA leaves out
            float((self._implementation == "eager" and getattr(attention, "attn_logit_softcapping", None)) or 0.0),
            self._residual,
        )
        owners = [layer] if plain else [attention, *(layer._modules[n] for n in found[:2] if n)]
        tensors = [t for m in owners for t in (*m.parameters(), *m.buffers())]
        if any(id(t) not in used for t in tensors) or layer._parameters:
            raise _UnfitError("a parameter of its own")
        addresses = (*(a for a, _ in (*norms, *heads)), sinks_at)
        self._core = _core.decoder_layer((*qkv, o, *gates), addresses, sizes, numbers)
        self._hidden, self._kv_heads, self._dim = hidden, kv_count, dim
        self._index, self._rotary = int(attention.layer_idx), bool(getattr(attention, "use_rope", True))
        self._layer = layer

    def _is_current(self, layer: Any) -> bool:
        """Whether the layer's modules are those that were described."""
        if self._layer is not layer or self._config._attn_implementation != self._implementation:
            return False
        for where, name, value in self._watched:
            if where.get(name) is not value:
                return False
        return all(tensor._version == version for tensor, version in self._versions)

    def _is_observed(self) -> bool:
        for m in self._modules:
            if m._forward_hooks or m._forward_pre_hooks:
                return True
        return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)

    def run(self, layer: Any, own: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        """Return what the layer returns, or None where its own forward is to be called.

        Raises:
            _UnfitError: the core cannot compute this layer at all.

        """
        cache, mask, rotation = (given.get(n) for n in ("past_key_values", "attention_mask", "position_embeddings"))
        if (
            type(cache) is not DynamicCache
            or layer.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        for name, value in given.items():
            if name not in _KNOWN and value:
                return None
        if not self._is_current(layer):
            if x.dim() != 3 or x.shape[0] * x.shape[1] > MOST_ROWS:  # a prompt: it may not be needed at all
                return None
            self._proved.clear()
            self._build(layer)
        if self._is_observed() or (self._rotary and type(rotation) is not tuple):
            return None
        kept: Any = cache.layers[self._index] if self._index < len(cache.layers) else None
        room: _Room | None = getattr(kept, "_qins_room", None)
        if room is None or not room.is_as_left(kept, self, x, mask):
            kind = self._kind(kept, x, mask, rotation)
            if kind is None:
                return None
            if kind not in self._proved:
                return self._prove(layer, own, x, given, kept, kind)
        y = self._finish(layer, self._call(x, kept, mask, rotation))
        return (y,) if self._in_tuple else y

    def _finish(self, layer: Any, x: Tensor) -> Tensor:
        """Run what of the layer the core does not know, after attention."""
        if self._after is None:
            return x
        before, after = (layer._modules[n] if n else None for n in self._after)
        y = layer._modules[self._mlp](x if before is None else before(x))
        y = y[0] if isinstance(y, tuple) else y  # beside what a router chose
        y = y if after is None else after(y)
        result: Tensor = x + (y if self._residual == 1.0 else y * self._residual)
        return result

    def _kind(self, kept: Any, x: Tensor, mask: Any, rotation: Any) -> tuple[Any, ...] | None:
        """The kind of call, each of which is proved once; None where the layer's own forward is to be called."""
        if type(kept) not in (DynamicLayer, DynamicSlidingWindowLayer) or getattr(kept, "record_past", False):
            return None
        if x.dim() != 3 or x.dtype not in _DTYPES or not x.is_cpu or x.shape[0] * x.shape[1] > MOST_ROWS:
            return None
        keys, values = kept.keys, kept.values
        if not kept.is_initialized or keys is None or keys.dim() != 4 or keys.shape[2] == 0 or keys.dtype != x.dtype:
            return None
        if keys.shape != values.shape or values.dtype != x.dtype or x.shape[2] != self._hidden:
            return None
        if (keys.shape[0], keys.shape[1], keys.shape[3]) != (x.shape[0], self._kv_heads, self._dim):
            return None
        if not _mask_fits(mask, x, keys.shape[2] + x.shape[1]):
            return None
        if self._rotary and not _rotates(rotation, x, self._dim // (2 if self._halves else 1)):
            return None
        return x.dtype, x.shape[0] > 1, x.shape[1] > 1, None if mask is None else mask.dtype, type(kept)

    def _prove(
        self, layer: Any, own: Callable[..., Any], x: Tensor, given: dict[str, Any], kept: Any, kind: tuple[Any, ...]
    ) -> Any:
        """Run the layer's own forward beside the step; from then on the step is trusted with such calls."""
        beside, other = copy.copy(given["past_key_values"]), copy.copy(kept)
        beside.layers = [*beside.layers]
        beside.layers[self._index] = other
        result = own(layer, x, **{**given, "past_key_values": beside})
        self._in_tuple = isinstance(result, tuple)
        want = result[0] if isinstance(result, tuple) else result
        if isinstance(result, tuple) and len(result) != 1:
            raise _UnfitError("it returns more than hidden states")
        got = self._finish(layer, self._call(x, kept, given.get("attention_mask"), given.get("position_embeddings")))
        pairs = (got - x, want - x), (kept.keys, other.keys), (kept.values, other.values)
        tolerance = _TOLERANCE[x.dtype]
        for a, b in pairs:
            if a.shape != b.shape or not (a - b).float().norm() <= tolerance * b.float().norm():
                kept.__dict__.update(other.__dict__)
                _give_up(layer, "its results are others")
                return result
        self._proved.add(kind)
        return result

    def _call(self, x: Tensor, kept: Any, mask: Tensor | None, rotation: Any) -> Tensor:
        sequences, tokens, _ = x.shape
        x = x.contiguous()
        y = torch.empty_like(x)
        room, past = _room(kept, tokens)
        cos_at = sin_at = rotary_dim = rotary_next = 0
        if self._rotary:
            (cos_at, sin_at, rotary_dim, rotary_next), _in_use = _rotation(rotation, x.dtype, self._halves)
        mask_at = is_bool = mask_sequence = mask_token = 0
        if mask is not None:
            mask_at, is_bool = mask.data_ptr(), int(mask.dtype == torch.bool)
            mask_sequence, mask_token = mask.stride(0) if len(mask) > 1 else 0, mask.stride(2)
        offset = room.begin * room.row_bytes
        _core.decode_layer(
            self._core, _DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), sequences, tokens,
            room.keys_at + offset, room.values_at + offset, room.size, past,
            cos_at, sin_at, rotary_dim, rotary_next, mask_at, is_bool, mask_sequence, mask_token,
            threads._chosen or torch.get_num_threads(),
        )  # fmt: skip
        end = room.end = room.begin + past + tokens
        if isinstance(kept, DynamicSlidingWindowLayer):
            room.begin = max(room.begin, end - kept.sliding_window + 1)
            kept.cumulative_length += tokens
        room.leave(kept, self, x)
        return y


class _Room:
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

    def leave(self, kept: Any, step: LayerStep, x: Tensor) -> None:
        """Let a cache's layer have the tokens that are there now."""
        count = self.end - self.begin
        kept.keys, kept.values = self.keys.narrow(2, self.begin, count), self.values.narrow(2, self.begin, count)
        self._left = kept.keys, kept.values, step, x.shape, x.dtype

    def is_as_left(self, kept: Any, step: LayerStep, x: Tensor, mask: Tensor | None) -> bool:
        """Whether a call is one more like the last, of whose kind of call nothing needs to be looked at again."""
        if mask is not None or not self._left or x.shape[1] != 1:
            return False
        _, _, last, shape, dtype = self._left
        same = last is step and x.shape == shape and x.dtype is dtype and self.has(kept.keys, kept.values)
        return same and not getattr(kept, "record_past", False)


def _room(kept: Any, tokens: int) -> tuple[_Room, int]:
    """Memory with room for so many more tokens behind those of a cache's layer, and how many these are."""
    keys, values = kept.keys, kept.values
    past = keys.shape[2]
    room: _Room | None = getattr(kept, "_qins_room", None)
    if room is not None and room.has(keys, values) and room.end + tokens <= room.size:
        return room, past
    size = past + tokens + max(past // 2, _ROOM)
    made = []
    for old in (keys, values):
        new = old.new_empty(*old.shape[:2], size, old.shape[3])
        new[:, :, :past] = old
        made.append(new)
    kept._qins_room = room = _Room(made[0], made[1], past)
    return room, past


_last_rotation: tuple[Any, ...] = (None, None, None)


def _rotation(
    rotation: tuple[Tensor, Tensor], dtype: torch.dtype, halves: bool
) -> tuple[tuple[int, int, int, int], Any]:
    """Cosines and sines for all layers once.

    Returns:
        their addresses, their number a token, and from a sequence to the next; and what keeps the memory.

    """
    global _last_rotation
    given, of_dtype, found = _last_rotation  # of another thread's call, perhaps
    if given is not rotation or of_dtype is not dtype:
        cos, sin = ((torch.cat((t, t), -1) if halves else t).to(dtype).contiguous() for t in rotation)
        next_sequence = cos.shape[1] * cos.shape[2] if cos.shape[0] > 1 else 0
        found = (cos.data_ptr(), sin.data_ptr(), cos.shape[2], next_sequence), (cos, sin)
        _last_rotation = rotation, dtype, found
    kept: tuple[tuple[int, int, int, int], Any] = found
    return kept


def _rotates(rotation: Any, x: Tensor, head_dim: int) -> bool:
    """Whether there are cosines and sines for each token, or for each of each sequence."""
    if not isinstance(rotation, tuple) or len(rotation) != 2 or not all(isinstance(t, Tensor) for t in rotation):
        return False
    cos, sin = rotation
    fits = cos.dim() == 3 and cos.shape == sin.shape and cos.shape[1] == x.shape[1] and cos.shape[0] in (1, x.shape[0])
    return fits and 0 < cos.shape[2] <= head_dim and (cos.shape[2] % 2 == 0 or cos.shape[2] == head_dim)


def _mask_fits(mask: Any, x: Tensor, total: int) -> bool:
    """Whether a mask is one for sequences, queries and keys; without one there must be one query each."""
    if mask is None:
        return x.shape[1] == 1
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype not in (torch.bool, x.dtype):
        return False
    return mask.shape[1:] == (1, x.shape[1], total) and mask.shape[0] in (1, len(x)) and mask.stride(3) == 1


def _mlp_of(layer: Any) -> str:
    """Name of a layer's MLP, or of what is there in its place."""
    return "mlp" if "mlp" in layer._modules else "block_sparse_moe"


def _act(mlp: Any) -> Any:
    return getattr(mlp, "act_fn", None) or mlp.activation_fn


def _give_up(layer: Any, why: object) -> None:
    layer.__dict__["_qins_step"] = None
    logger.info("qins: layer %s decodes with its own modules: %s", layer.self_attn.layer_idx, why)


def _with_step(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder layer's forward that takes the step where it can."""

    @functools.wraps(forward)
    def wrapped(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        step: LayerStep | None = self.__dict__.get("_qins_step")
        if step is not None and not args and isinstance(hidden_states, Tensor):
            try:
                result = step.run(self, forward, hidden_states, kwargs)
            except (_UnfitError, AttributeError) as e:
                _give_up(self, e)
                result = None
            if result is not None:
                return result
        return forward(self, hidden_states, *args, **kwargs)

    wrapped.__dict__["_qins_wrapped"] = True
    return wrapped


def decode_in_steps(model: nn.Module) -> int:
    """Let the decoder layers of a model take a few tokens at a time in one call of the core; return how many may.

    Raises:
        ValueError: QINS_DECODE_STEP, which switches it off where it is 0, is something else than 0 or 1.

    """
    told = os.environ.get("QINS_DECODE_STEP", "")
    if told not in ("", "0", "1"):
        raise ValueError(f"environment variable QINS_DECODE_STEP: expected 0 or 1, got {told!r}")
    count = 0
    if told == "0":
        return count
    for module in model.modules():
        kind: Any = type(module)
        if "self_attn" not in module._modules or _mlp_of(module) not in module._modules:
            continue
        if not kind.forward.__dict__.get("_qins_wrapped"):
            kind.forward = _with_step(kind.forward)
        module.__dict__["_qins_step"] = LayerStep()
        count += 1
    return count
