"""A Phi-3 model with SmolLM2's weights, saved in place of microsoft/Phi-3.5-mini-instruct in a hub cache."""

from __future__ import annotations

import json
from pathlib import Path

import torch

NAME = "microsoft/Phi-3.5-mini-instruct"
PROMPTS = [
    "The capital of France is", "Water boils at", "The largest planet of the solar system is",
    "def fibonacci(n):\n", "Once upon a time, there was", "The chemical symbol of gold is",
    "To make bread, you need", "The first president of the United States was", "In 1969, humans",
    "The opposite of hot is", "Photosynthesis is the process by which",
]  # fmt: skip


def from_llama(llama):
    """Return a Phi3ForCausalLM that computes the same as `llama`, with q, k, v fused, and gate and up fused."""
    from transformers import Phi3Config, Phi3ForCausalLM

    c = llama.config
    rope = dict(getattr(c, "rope_parameters", None) or {"rope_theta": c.rope_theta, "rope_type": "default"})
    config = Phi3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, max_position_embeddings=c.max_position_embeddings,
        original_max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings, bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id, rope_parameters=rope, sliding_window=None, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        phi = Phi3ForCausalLM(config)
    phi.to_empty(device="cpu")
    phi.model.rotary_emb.inv_freq = llama.model.rotary_emb.inv_freq.clone()
    phi.model.rotary_emb.original_inv_freq = phi.model.rotary_emb.inv_freq.clone()
    source, state = llama.state_dict(), {}
    for key, value in source.items():
        if ".q_proj." in key:
            parts = [source[key.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            state[key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".gate_proj." in key:
            parts = [value, source[key.replace("gate_proj", "up_proj")]]
            state[key.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
        elif not any(f".{p}_proj." in key for p in ("k", "v", "up")):
            state[key] = value
    phi.load_state_dict(state)
    phi.tie_weights()
    return phi.eval()


def save_to_hub_cache(model, tokenizer, home: Path) -> dict[str, str]:
    """Save both under the hub's name; return the environment in which transformers finds them."""
    repository = home / "hub" / f"models--{NAME.replace('/', '--')}"
    revision = "0" * 40
    snapshot = repository / "snapshots" / revision
    model.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    assert json.loads((snapshot / "config.json").read_text())["model_type"] == "phi3"
    return {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}


def tiny(tied: bool):
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=200, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()
