"""Tiny random mixtures of experts."""

from __future__ import annotations

import torch
import transformers
from tiny import COMMON
from torch import nn

V5 = int(transformers.__version__.partition(".")[0]) >= 5


EXPERTS = 4


def mixtral(**sizes):
    config = COMMON | {"num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2} | sizes
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**config))


def qwen2_moe():
    config = transformers.Qwen2MoeConfig(
        **COMMON, num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        **COMMON, num_key_value_heads=2, head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=2,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


def llama4():
    config = transformers.Llama4TextConfig(
        **COMMON, num_key_value_heads=2, head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=2,
        intermediate_size_mlp=96, interleave_moe_layer_step=1,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


MODELS = {"gpt_oss": gpt_oss, "llama4": llama4} | ({"mixtral": mixtral, "qwen2_moe": qwen2_moe} if V5 else {})


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():
        if p.ndim == 3 or key.endswith("bias"):
            nn.init.normal_(p, std=0.05)
    return model
