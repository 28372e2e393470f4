"""What the layers of a family compute, from config.json alone: a table of families, and numbers from the config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _core

Array = np.ndarray[Any, Any]

_BOTH = ("input_layernorm", None, "post_attention_layernorm", None)
_FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama.

    Attributes:
        norms: names of the norms before and after attention, and before and after the MLP.
        gemma: norm weights are stored minus 1, and embeddings are multiplied by sqrt(hidden_size).
        head_norms: queries and keys are normalized: "head", each head by itself; "row", all heads as one row.
        fused: q, k and v are one matrix, and so are gate and up.
        all_slide: without layer_types, a sliding_window holds for every layer.

    """

    norms: tuple[str | None, ...] = _BOTH
    gemma: bool = False
    head_norms: str = ""
    fused: bool = False
    all_slide: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(all_slide=True),
    "qwen2": Family(),
    "qwen3": Family(head_norms="head"),
    "smollm3": Family(),
    "phi3": Family(fused=True, all_slide=True),
    "olmo2": Family(norms=_AFTER, head_norms="row"),
    "granite": Family(),
    "gemma": Family(gemma=True),
    "gemma2": Family(norms=_FOUR, gemma=True),
    "gemma3_text": Family(norms=_FOUR, gemma=True, head_norms="head"),
}
_MOST_LAYERS = 1 << 16
_MOST = float(np.finfo(np.float32).max)  # the core computes in float32
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}


@dataclass(frozen=True)
class Shape:
    """Sizes and factors of a model.

    Attributes:
        family: its row of the table.
        vocabulary, layers, hidden, heads, kv_heads, head_dim, inner: sizes.
        activation: the core's number of the MLP's activation.
        epsilon: of norms.
        scaling: factor of attention scores.
        softcap, final_softcap: bounds of attention scores and of logits; 0: none.
        residual: factor of each term added to the hidden states.
        embedding: factor of embeddings.
        logits: divisor of logits.
        windows: of each layer, the number of tokens that a token attends to, itself included; 0: all.
        layer_types: of each layer, "full_attention" or "sliding_attention".
        rotates: of each layer, whether queries and keys are rotated.
        frequencies: of the rotation by layer type, in radians per token.
        tied: whether an output embedding without tensors of its own is the input embedding; config.json does not
            repeat a family's default.

    """

    family: Family
    vocabulary: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    activation: int
    epsilon: float
    scaling: float
    softcap: float
    final_softcap: float
    residual: float
    embedding: float
    logits: float
    windows: list[int]
    layer_types: list[str]
    rotates: list[bool]
    frequencies: dict[str, Array]
    tied: bool


class _Config:
    """config.json, whose values are checked as they are read."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise ValueError(f"config.json: {name}: expected a positive integer, got {value!r}")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.number(name, default)
        if value <= 0.0:
            raise ValueError(f"config.json: {name}: expected a positive number, got {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -_MOST <= value <= _MOST:
            raise ValueError(f"config.json: {name}: expected a finite number, got {value!r}")
        return float(value)

    def list_of(self, name: str, count: int) -> list[Any] | None:
        value = self.values.get(name)
        if value is not None and (not isinstance(value, list) or len(value) != count):
            raise ValueError(f"config.json: {name}: expected one entry for each of {count} layers, got {value!r}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"config.json: {name}: expected an object, got {value!r}")
        return value or {}


def shape_of(values: dict[str, Any]) -> Shape:
    """Return what config.json says of a model.

    Raises:
        ValueError: the family is not supported, or a value is missing or out of range.

    """
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ValueError(f"config.json: model_type: expected one of {', '.join(FAMILIES)}, got {kind!r}")
    c = _Config(values)
    layers, hidden, heads = (c.integer(n) for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if layers > _MOST_LAYERS:  # whose lists would take more memory than the files do
        raise ValueError(f"config.json: num_hidden_layers: expected at most {_MOST_LAYERS}, got {layers}")
    kv_heads, head_dim = c.integer("num_key_value_heads", heads), c.integer("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"config.json: expected num_key_value_heads that divide {heads} heads and an even head_dim, got {kv_heads} "
            f"and {head_dim}"
        )
    told = values.get("hidden_activation") or values.get("hidden_act", "silu")
    if not isinstance(told, str) or told not in ACTIVATIONS:
        raise ValueError(f"config.json: activation: expected one of {', '.join(ACTIVATIONS)}, got {told!r}")
    if head_dim > _core.DECODER_HEAD_DIM:
        raise ValueError(f"config.json: head_dim: expected at most {_core.DECODER_HEAD_DIM}, got {head_dim}")
    scaling = c.positive("query_pre_attn_scalar", head_dim) ** -0.5
    types = c.list_of("layer_types", layers)
    windows = _windows(c, family, layers, types)
    types = types or ["full_attention"] * layers
    if wrong := [t for t in types if t not in ("full_attention", "sliding_attention")]:
        raise ValueError(f"config.json: layer_types: expected full_attention or sliding_attention, got {wrong[0]!r}")
    return Shape(
        family, c.integer("vocab_size"), layers, hidden, heads, kv_heads, head_dim, c.integer("intermediate_size"),
        ACTIVATIONS[told], c.number("rms_norm_eps", 1e-6), c.number("attention_multiplier", scaling),
        c.number("attn_logit_softcapping", 0.0), c.number("final_logit_softcapping", 0.0),
        c.number("residual_multiplier", 1.0),
        math.sqrt(hidden) if family.gemma else c.number("embedding_multiplier", 1.0),
        c.positive("logits_scaling", 1.0), windows, types,
        [bool(r) for r in c.list_of("no_rope_layers", layers) or [1] * layers],
        {t: _frequencies(_rotation(c, t), head_dim) for t in set(types)},
        values.get("tie_word_embeddings") is not False,
    )  # fmt: skip


def _windows(c: _Config, family: Family, layers: int, types: list[Any] | None) -> list[int]:
    if c.values.get("sliding_window") is None or c.values.get("use_sliding_window") is False:
        return [0] * layers
    window = c.integer("sliding_window")
    if types is not None:
        return [window if t == "sliding_attention" else 0 for t in types]
    if family.all_slide:
        return [window] * layers
    raise ValueError("config.json: layer_types: expected the kind of each layer beside sliding_window, got none")


def _rotation(c: _Config, layer_type: str) -> _Config:
    """Return the parameters of the rotary embedding of one type of layers, as transformers 4 or 5 saves them."""
    given = c.mapping("rope_parameters")
    if isinstance(given.get(layer_type), dict):
        return _Config(given[layer_type])
    if layer_type == "sliding_attention" and c.values.get("rope_local_base_freq") is not None:  # Gemma 3
        return _Config({"rope_theta": c.values["rope_local_base_freq"]})
    if given:
        return _Config(given)
    told = {name: c.values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    return _Config(told | c.mapping("rope_scaling"))


def _frequencies(c: _Config, head_dim: int) -> Array:
    """Return the rotary embedding's frequencies, as transformers' modeling_rope_utils computes them."""
    dim = int(head_dim * c.number("partial_rotary_factor", 1.0))
    if not 0 < dim <= head_dim or dim % 2:
        raise ValueError(f"config.json: partial_rotary_factor: expected an even part of {head_dim}, got {dim}")
    frequency = 1.0 / c.positive("rope_theta", 1e4) ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    kind = c.values.get("rope_type") or c.values.get("type") or "default"
    if kind == "linear":
        frequency = frequency / c.positive("factor", 1.0)
    elif kind == "llama3":
        low, high = c.number("low_freq_factor", 1.0), c.number("high_freq_factor", 4.0)
        if low == high:
            raise ValueError(f"config.json: high_freq_factor: expected another number than low_freq_factor, got {high}")
        turns = c.number("original_max_position_embeddings", 8192) * frequency / (2 * math.pi)
        part = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = part * frequency + (1.0 - part) * frequency / c.positive("factor", 8.0)
    elif kind != "default":
        raise ValueError(f"config.json: rope_type: expected default, linear or llama3, got {kind!r}")
    return frequency.astype(np.float32)
