"""The seed's toy language model: three layers, hidden size 256, 5,000 tokens, tied head, normal(0, 0.02) weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

HIDDEN, HEADS, LAYERS, VOCABULARY = 256, 4, 3, 5000


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in "qkvo")
        self.up_proj, self.down_proj = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        # normalized after each sum, so that the token outweighs what the random layers add to it
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for p in (self.q_proj, self.k_proj, self.v_proj))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norm1(x + self.o_proj(attended.transpose(-2, -3).flatten(-2)))
        return self.norm2(x + self.down_proj(functional.gelu(self.up_proj(x))))


class ToyModel(nn.Module):
    def __init__(self, seed=42):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, 0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return functional.linear(x, self.embed.weight)


@torch.no_grad()
def greedy(model, prompt, steps, context=64):
    """Return the tokens of greedy decoding; the model sees the last `context` tokens."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids[-context:]]))[0, -1].argmax()))
    return ids[len(prompt) :]
