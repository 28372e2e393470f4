"""Tiny random models of all families that decode in steps."""

from __future__ import annotations

import torch
import transformers
from tiny import COMMON
from torch import nn
from torch.nn.functional import log_softmax

import qins

WINDOW = 8
SIZES = COMMON | {"num_key_value_heads": 2, "num_hidden_layers": 4}
FAMILIES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "Qwen3": {"head_dim": 24},
    "SmolLM3": {},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "Gemma3": {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "Phi3": {"partial_rotary_factor": 0.5},
    "Olmo2": {},
    "Mixtral": {"num_local_experts": 4, "sliding_window": WINDOW},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
    "GptOss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention"] * 2, "attention_bias": True,
    },
    "GraniteMoe": {"num_local_experts": 4, "residual_multiplier": 0.5},
    "Granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.2, "embedding_multiplier": 2.0},
}  # fmt: skip


def family(name, **more):
    """Return a tiny random quantized model of a family, with norms and biases far from their initial values."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
    config = kind(**{**SIZES, **FAMILIES[name], **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, p in model.named_parameters():
        if "norm" in key:
            nn.init.normal_(p, 0.1 if "Gemma" in name else 0.8, 0.2)
        elif key.endswith(("bias", "sinks")):
            nn.init.normal_(p, 0.0, 0.1)
    return converted(model)


def converted(model):
    qins.convert(model, exclude=())
    return model


def layers_of(model):
    return [m for m in model.modules() if "_qins_step" in m.__dict__]


def without_steps(model):
    for layer in layers_of(model):
        layer.__dict__["_qins_step"] = None
    for module in model.modules():
        module.__dict__.pop("_qins_fused", None)


def proved(model):
    return [len(layer._qins_step._proved) if layer._qins_step else 0 for layer in layers_of(model)]


def divergence(a, b):
    """Return the largest KL divergence of a prediction, in nats."""
    a, b = log_softmax(a.double(), -1), log_softmax(b.double(), -1)
    return float((b.exp() * (b - a)).sum(-1).max())
