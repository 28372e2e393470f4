"""Description of a decoder layer for the core, read off its modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .. import _core
from ..nn import QINSLinear, numbers_of
from .replacing import UnfitError

Tensor = torch.Tensor

# Families whose source was reviewed: comparing a few tokens would not reveal, say, what depends on the position.
_FAMILIES = {
    "Gemma", "Gemma2", "Gemma3", "GptOss", "Granite", "GraniteMoe", "Llama", "Mistral", "Mixtral", "Olmo2", "Olmo3",
    "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "SeedOss", "SmolLM3",
}  # fmt: skip
# A layer's norms to their roles: before attention, after attention, before the MLP, after the MLP.
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


def is_reviewed(kind: type, role: str) -> bool:
    """Return whether a class is a reviewed family's module with this role: DecoderLayer, RMSNorm, MLP or Attention."""
    return kind.__name__.removesuffix(role) in _FAMILIES and kind.__module__.startswith("transformers.models.")


@dataclass
class LayerDescription:
    """A decoder layer for the core, and the state on which the description depends.

    Attributes:
        core: handle for `_core.decode_layer`.
        hidden, kv_heads, head_dim: sizes.
        index: index of the layer in a cache.
        rotates: whether queries and keys are rotated (RoPE).
        halves: whether cosines and sines are given once for both halves of a head.
        mlp: name of the MLP.
        rest: names of the norms before and after an MLP that the core does not support; None if it does.
        residual: factor of what is added to the hidden states.
        modules: modules that the step bypasses.
        config: the attention's.
        watched, versions, hooks: dictionaries with keys and values, tensors with version counters, and dictionaries of
            forward hooks: while the first two stay as they are, the description holds.

    """

    core: object
    hidden: int
    kv_heads: int
    head_dim: int
    index: int
    rotates: bool
    halves: bool
    mlp: str
    rest: tuple[str | None, ...] | None
    residual: float
    modules: list[nn.Module]
    config: Any
    _reader: _Reader
    _implementation: str

    def __post_init__(self) -> None:
        of_modules = [(vars(m), n, vars(m)[n]) for m in self.modules for n in ("_forward_hooks", "_forward_pre_hooks")]
        self.watched = (*self._reader.watched, *of_modules)
        self.versions = self._reader.versions
        self.hooks = tuple(hooks for _, _, hooks in of_modules)

    @property
    def rotary_most(self) -> int:
        """Most cosines that a token may have."""
        return self.head_dim // (2 if self.halves else 1)

    def is_current(self) -> bool:
        """Return whether the layer's modules and parameters are still the described ones."""
        if self.config._attn_implementation != self._implementation or not _core.are_unchanged(self.watched, ()):
            return False
        return are_of_versions(self.versions)

    def is_observed(self) -> bool:
        """Return whether a forward hook is registered, globally or on a module that the step bypasses."""
        anywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        return bool(anywhere) or not _core.are_unchanged((), self.hooks)


def are_of_versions(versions: list[tuple[Tensor, int]]) -> bool:
    """Return whether tensors have not been written to."""
    for tensor, version in versions:  # noqa: SIM110 - twice as fast as a generator, many times per token
        if tensor._version != version:
            return False
    return True


class _Reader:
    """Reads modules, and records what it has read.

    Attributes:
        watched: dictionaries, keys in them, and the values read.
        versions: tensors that were copied, and their version counters.
        modules: the modules read.
        used: ids of the tensors read.
        copies: float32 copies that the core reads.

    """

    def __init__(self) -> None:
        self.watched: list[tuple[dict[str, Any], str, Any]] = []
        self.versions: list[tuple[Tensor, int]] = []
        self.modules: list[nn.Module] = []
        self.used: set[int] = set()
        self.copies: list[Tensor] = []

    def child(self, parent: nn.Module, name: str | None) -> nn.Module | None:
        """Return a child module by name; None without one."""
        found = parent._modules.get(name) if name else None
        if found is not None:
            self.watched.append((parent._modules, str(name), found))
            self.modules.append(found)
        return found

    def floats(self, owner: nn.Module, name: str, value: Tensor | None) -> int:
        """Copy a parameter's float32 value and return the copy's address; 0 without a value."""
        if value is None:
            return 0
        original: Any = owner._parameters[name]
        if original.is_inference():  # it has no version counter
            raise UnfitError(f"{name} is an inference tensor")
        self.watched.append((owner._parameters, name, original))
        self.versions.append((original, original._version))
        self.used.add(id(original))
        self.copies.append(value.detach().float().contiguous().clone())
        return self.copies[-1].data_ptr()

    def product(self, parent: nn.Module, name: str) -> tuple[int, ...] | None:
        """Return the core's arguments for a linear layer; None without one."""
        linear = self.child(parent, name)
        if linear is None:
            return None
        if type(linear) is not QINSLinear or linear._non_persistent_buffers_set:
            raise UnfitError(f"{name} is a {type(linear).__name__}")
        fields: list[Any] = [linear._buffers[n] for n in linear._names]
        numbers = numbers_of(fields, linear.codec, linear.group_size)
        if numbers is None:
            raise UnfitError(f"{name} is not on the CPU, or not contiguous")
        for buffer, field in zip(linear._names, fields, strict=True):
            self.watched.append((linear._buffers, buffer, field))
            self.used.add(id(field))
        return (*numbers, self.floats(linear, "bias", linear._parameters["bias"]))

    def norm(self, parent: nn.Module, name: str | None) -> tuple[int, float]:
        """Return the address of a norm's weight, and its epsilon; zeros without a norm."""
        module = self.child(parent, name)
        if module is None:
            return 0, 0.0
        weight, epsilon = norm_of(module)
        return self.floats(module, "weight", weight), epsilon

    def epsilon(self, norms: list[tuple[int, float]]) -> float:
        """Return the epsilon that these norms share; 0.0 without norms."""
        found = {e for at, e in norms if at}
        if len(found) > 1:
            raise UnfitError("norms with different epsilons")
        return next(iter(found), 0.0)


def norm_of(norm: nn.Module) -> tuple[Tensor, float]:
    """Return the float32 weight and the epsilon of an RMS norm.

    Raises:
        UnfitError: it computes something else.

    """
    weight = norm._parameters.get("weight")
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or epsilon is None or len([*norm.parameters()]) != 1:
        raise UnfitError(f"a {type(norm).__name__}")
    x = torch.linspace(-1.0, 2.0, weight.numel())
    scaled = x * torch.rsqrt(x.square().mean() + epsilon)
    with torch.no_grad():
        own = copy.copy(norm)  # with its own dictionaries, so that the module stays unchanged
        own.__dict__["_parameters"] = {"weight": nn.Parameter(weight.float(), requires_grad=False)}
        own.__dict__["_qins_fused"] = None
        got = type(norm).forward(own, x)
        for factor in (weight.float(), 1.0 + weight.float()):
            if got.shape == x.shape and torch.allclose(got.float(), scaled * factor, rtol=1e-5, atol=1e-6):
                return factor.detach().clone(), float(epsilon)
    raise UnfitError(f"a {type(norm).__name__}")


def activation_of(mlp: Any) -> int:
    """Return the core's number of a gated MLP's activation.

    Raises:
        UnfitError: the core does not support it.

    """
    act = getattr(mlp, "act_fn", None) or mlp.activation_fn
    x = torch.linspace(-6.0, 6.0, 101)
    known = nn.functional.silu(x), nn.functional.gelu(x, approximate="tanh")
    for number, y in enumerate(known):
        if torch.allclose(act(x), y, rtol=1e-6, atol=1e-7):
            return number
    raise UnfitError(f"the activation {type(act).__name__}")


def _harmless(module: nn.Module) -> bool:
    """Return whether a module has no state, like activations and dropout; a quantized layer has buffers."""
    return not ([*module.parameters(), *module.buffers()] or module._modules)


def mlp_of(layer: Any) -> str:
    """Return the name of a decoder layer's MLP, or of the module in its place."""
    return "mlp" if "mlp" in layer._modules else "block_sparse_moe"


def describe(layer: Any) -> LayerDescription:
    """Describe a decoder layer for the core.

    Raises:
        UnfitError: the core does not support it.

    """
    if not is_reviewed(type(layer), "DecoderLayer"):
        raise UnfitError(f"a {type(layer).__name__}")
    try:
        return _describe(layer)
    except AttributeError as e:
        raise UnfitError(str(e)) from None


def _describe(layer: Any) -> LayerDescription:
    attention, mlp_name = layer.self_attn, mlp_of(layer)
    mlp = layer._modules[mlp_name]
    config, implementation = attention.config, attention.config._attn_implementation
    if implementation.removeprefix("paged|") not in ("sdpa", "eager"):
        raise UnfitError(f"attention implementation {implementation}")
    names = {n for n, m in layer._modules.items() if m is not None and not _harmless(m)}
    of_norms = _NORMS.get(frozenset(names - {"self_attn", mlp_name}))
    if of_norms is None:
        raise UnfitError(f"unsupported modules {', '.join(sorted(names))}")
    # anything but a plain MLP, such as a mixture of experts, runs its own forward after attention
    inside = {n for n, m in mlp._modules.items() if not _harmless(m)}
    plain = inside in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
    reader = _Reader()
    reader.modules += [attention, mlp] if plain else [attention]
    norms = [reader.norm(layer, n) for n in (of_norms if plain else (*of_norms[:2], None, None))]
    heads = [reader.norm(attention, n) for n in ("q_norm", "k_norm")]
    sinks = attention._parameters.get("sinks")
    sinks_at = reader.floats(attention, "sinks", sinks)
    of_attention, kv_heads = _attention(reader, attention)
    of_mlp, inner = _mlp(reader, mlp, "gate_up_proj" in inside) if plain else ([None] * 3, 0)
    owners = [layer] if plain else [attention, *(layer._modules[n] for n in of_norms[:2] if n)]
    tensors = [t for m in owners for t in (*m.parameters(), *m.buffers())]
    if layer._parameters or any(id(t) not in reader.used for t in tensors):
        raise UnfitError("a parameter that the core does not use")
    hidden, dim = attention.o_proj.out_features, int(attention.head_dim)
    residual = float(getattr(layer, "residual_multiplier", 1.0))
    softcap = getattr(attention, "attn_logit_softcapping", None) if implementation == "eager" else None  # SDPA has none
    core = _core.decoder_layer(
        (*of_attention, *of_mlp),
        (*(at for at, _ in (*norms, *heads)), sinks_at),
        (
            hidden, attention.o_proj.in_features // dim, kv_heads, dim, inner,
            int(heads[0][0] != 0 and attention.q_norm.weight.numel() == dim), activation_of(mlp) if plain else 0,
        ),
        (reader.epsilon(norms), reader.epsilon(heads), float(attention.scaling), float(softcap or 0.0), residual),
    )  # fmt: skip
    return LayerDescription(
        core, hidden, kv_heads, dim, int(attention.layer_idx), bool(getattr(attention, "use_rope", True)),
        sinks is not None,  # GPT-OSS
        mlp_name, None if plain else of_norms[2:], residual, reader.modules, config, reader, implementation,
    )  # fmt: skip


def _attention(reader: _Reader, attention: Any) -> tuple[list[tuple[int, ...] | None], int]:
    """Return the core's arguments for the query, key, value and output projections, and the number of KV heads."""
    fused = "qkv_proj" in attention._modules
    names = ("qkv_proj", "", "") if fused else ("q_proj", "k_proj", "v_proj")
    found = [reader.product(attention, n) for n in (*names, "o_proj")]
    if [p is None for p in found] != [False, fused, fused, False]:
        raise UnfitError("a missing projection")
    dim = int(attention.head_dim)
    heads = attention.o_proj.in_features // dim
    width = (attention.qkv_proj if fused else attention.q_proj).out_features
    kv_heads: int = (width // dim - heads) // 2 if fused else attention.k_proj.out_features // dim
    fits = width == (heads + 2 * kv_heads if fused else heads) * dim
    if not fits or dim > _core.DECODER_HEAD_DIM or dim % 2 or kv_heads < 1 or heads % kv_heads:
        raise UnfitError("unsupported sizes")
    return found, kv_heads


def _mlp(reader: _Reader, mlp: Any, fused: bool) -> tuple[list[tuple[int, ...] | None], int]:
    """Return the core's arguments for the projections of a gated MLP, and its intermediate size."""
    names = ("gate_up_proj", "", "down_proj") if fused else ("gate_proj", "up_proj", "down_proj")
    inner: int = mlp.down_proj.in_features
    if (mlp.gate_up_proj if fused else mlp.gate_proj).out_features != inner * (2 if fused else 1):
        raise UnfitError("unsupported sizes")
    return [reader.product(mlp, n) for n in names], inner
