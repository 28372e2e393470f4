"""Pattern A on a toy transformer: greedy tokens of float32 weights and of golden codes, and memory by class."""

import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, "src")
from src.qins_codec import QINSLinear


class Attention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x):
        b, t, h = x.shape
        split = lambda y: y.view(b, t, self.heads, h // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x)), is_causal=True
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, t, h))


class Block(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class ToyLM(nn.Module):
    def __init__(self, vocab=5000, hidden=256, layers=3, heads=4):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList([Block(hidden, heads) for _ in range(layers)])
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self.lm_head.weight = self.embed.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0.0, 0.02)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def convert(model):
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear) and name != "lm_head":
            setattr(model, name, QINSLinear.from_linear(child))
        else:
            convert(child)
    return model


@torch.no_grad()
def greedy(model, ids, steps):
    out = []
    for _ in range(steps):
        token = model(ids[:, -64:])[:, -1].argmax(-1, keepdim=True)
        out.append(token.item())
        ids = torch.cat([ids, token], 1)
    return out


def model_bytes(model):
    total, seen = 0, set()
    for module in model.modules():
        if isinstance(module, QINSLinear):
            total += module.stored.numel() + module.sign.numel() + 8
            total += 0 if module.bias is None else module.bias.numel() * 4
        elif isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
            for p in module.parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    total += p.numel() * p.element_size()
    return total


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    torch.manual_seed(42)
    fp32 = ToyLM().eval()
    torch.manual_seed(42)
    qins = convert(ToyLM()).eval()
    layers = [m for m in qins.modules() if isinstance(m, QINSLinear)]
    assert layers and not any(isinstance(m, nn.Linear) for m in layers)
    prompt = torch.randint(0, 5000, (1, 8), generator=torch.Generator().manual_seed(7))
    start = time.time()
    a, b = greedy(fp32, prompt, steps), greedy(qins, prompt, steps)
    for layer in layers:
        layer.clear_cache()
    match = sum(x == y for x, y in zip(a, b))
    before, after = model_bytes(fp32), model_bytes(qins)
    print(f"Greedy match: {100 * match / steps:.2f}% ({match}/{steps} tokens) in {time.time() - start:.1f} s")
    print(f"FP32 {before / 2**20:.2f} MB, QINS {after / 2**20:.2f} MB, {before / after:.2f}x")
    torch.save(qins.state_dict(), "toy_qins.pt")


if __name__ == "__main__":
    main()
