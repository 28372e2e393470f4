"""Tiny random models of many architectures, and helpers to compare them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import torch
import transformers
from torch import nn

import qins

COMMON = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip


def llama(tied=False):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**COMMON, num_key_value_heads=2, tie_word_embeddings=tied)
    )


def phi3():
    config = transformers.Phi3Config(**COMMON, num_key_value_heads=2, original_max_position_embeddings=128)
    return transformers.Phi3ForCausalLM(config)


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON, num_key_value_heads=2))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**COMMON))


def modernbert():
    config = transformers.ModernBertConfig(**COMMON, cls_token_id=1, sep_token_id=2)
    return transformers.ModernBertForMaskedLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=160, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = COMMON | {"num_key_value_heads": 2, "rope_parameters": rope, "rope_scaling": rope}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=150, video_token_id=151, vision_start_token_id=152,
        vision_end_token_id=153,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


MODELS = {
    "llama": llama, "llama tied": lambda: llama(True), "phi3": phi3, "qwen2": qwen2, "gpt2": gpt2, "bert": bert,
    "modernbert": modernbert, "t5": t5, "qwen2_vl": qwen2_vl,
}  # fmt: skip


def make(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():  # some biases start at zero, which would hide a lost one
        if key.endswith("bias"):
            nn.init.normal_(p, std=0.02)
    return model


def outputs(model):
    ids = torch.arange(3, 43).reshape(2, 20)
    kwargs = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(ids, **kwargs).logits


def with_decoded_weights(original, quantized):
    """Return the float model with the dequantized weights; weights that became codes are untied."""
    decoded = copy.deepcopy(original)
    for name, module in quantized.named_modules():
        target = decoded.get_submodule(name)
        if isinstance(module, (qins.QINSLinear, qins.QINSEmbedding)):
            w = module.weight
            turned = not isinstance(target, (nn.Linear, nn.Embedding))  # Conv1D
            target.weight = nn.Parameter(w.T.contiguous() if turned else w)
        elif isinstance(module, qins.QINSExperts):
            for stack in module.shapes:
                w = module.weight(stack)
                setattr(target, stack, nn.Parameter(w.transpose(1, 2).contiguous() if module.is_transposed else w))
    return decoded


def close(a, b):
    return float((a - b).norm() / b.norm()) < 2e-3


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    return True


WITHOUT_QINS = """
import sys
sys.modules["qins"] = sys.modules["_qins_autoload"] = None
import transformers
for architecture, path in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, architecture).from_pretrained(path)
    except RuntimeError as e:
        print("refused" if "ignore_mismatched_sizes" in str(e) or "size mismatch" in str(e) else e)
    else:
        print("loaded")
"""


def without_qins(*models):
    """Load checkpoints, given as (class, directory), without qins; return the outcome of each."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    arguments = [str(a) for model in models for a in model]
    command = [sys.executable, "-c", WITHOUT_QINS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Unknown quantization type, got qins") >= len(models)
    return done.stdout.split()
