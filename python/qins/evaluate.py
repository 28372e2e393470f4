"""How close a quantised language model stays to its float original, and how fast both are."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

Tensor = torch.Tensor


def sample_text() -> str:
    """Return the public-domain English text that ships with the package: the US Constitution, 10,700 tokens."""
    return (resources.files("qins") / "data" / "constitution.txt").read_text(encoding="utf-8")


def windows(token_ids: Tensor, tokens: int, length: int = 512) -> list[Tensor]:
    """Cut the first `tokens` ids into (1, length) windows; the last may be shorter, but not under 2."""
    ids = token_ids.reshape(-1)[:tokens]
    return [part[None] for part in torch.split(ids, length) if part.numel() > 1]


@dataclass(frozen=True)
class Fidelity:
    """Next-token distributions of a model against its reference, over `tokens` predictions.

    Attributes:
        kl_mean: mean of KL(reference || model), in nats.
        kl_p99: its 99th percentile.
        kl_max: its maximum.
        top1: share of predictions where both have the same most likely token.
        reference_perplexity: of the text, under the reference.
        perplexity: of the text, under the model.

    """

    tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    reference_perplexity: float
    perplexity: float


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1)


@torch.no_grad()
def fidelity(reference: Any, model: Any, ids: Iterable[Tensor], advance: Any = None) -> Fidelity:
    """Compare two causal language models on windows of token ids, each of shape (1, length)."""
    divergences, same, reference_loss, loss = [], 0, 0.0, 0.0
    for window in ids:
        p, q = _log_probabilities(reference, window), _log_probabilities(model, window)
        divergences.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64).clamp_min(0.0))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        target = window[0, 1:, None]
        reference_loss -= float(p.gather(1, target).sum(dtype=torch.float64))
        loss -= float(q.gather(1, target).sum(dtype=torch.float64))
        if advance is not None:
            advance(window.numel())
    kl = torch.cat(divergences)
    n = kl.numel()
    return Fidelity(
        tokens=n,
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        kl_max=float(kl.max()),
        top1=same / n,
        reference_perplexity=float(torch.tensor(reference_loss / n, dtype=torch.float64).exp()),
        perplexity=float(torch.tensor(loss / n, dtype=torch.float64).exp()),
    )


@torch.no_grad()
def greedy(model: Any, ids: Tensor, tokens: int) -> tuple[Tensor, float]:
    """Generate exactly `tokens` greedy tokens after (1, length) ids; return them and tokens a second of decoding.

    The prompt's own pass is not in the time.
    """
    out = model(ids, use_cache=True)
    produced = [out.logits[:, -1].argmax(-1, keepdim=True)]
    begin = time.perf_counter()
    for _ in range(tokens - 1):
        out = model(produced[-1], past_key_values=out.past_key_values, use_cache=True)
        produced.append(out.logits[:, -1].argmax(-1, keepdim=True))
    seconds = time.perf_counter() - begin
    return torch.cat(produced, 1)[0], (tokens - 1) / seconds if tokens > 1 else float("nan")


def bytes_by_component(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by kind of module; storage that several modules share counts once."""
    sizes: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            kind = "linear layers"
        elif isinstance(module, torch.nn.Embedding):
            kind = "embeddings"
        else:
            kind = "norms and the rest"
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for t in tensors:
            key = (t.untyped_storage().data_ptr(), int(t.storage_offset()))
            if key not in seen:
                seen.add(key)
                sizes[kind] = sizes.get(kind, 0) + t.numel() * t.element_size()
    return sizes
