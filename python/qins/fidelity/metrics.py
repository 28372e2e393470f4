"""Metrics: how close a quantized model stays to its float original, and how fast both are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import torch

from ..nn import QINSExperts, projections

Tensor = torch.Tensor


def sample_text() -> str:
    """Return the public-domain English text that ships with the package: the US Constitution (10,700 tokens)."""
    return (resources.files("qins") / "data" / "constitution.txt").read_text(encoding="utf-8")


def windows(token_ids: Tensor, tokens: int, length: int = 512) -> list[Tensor]:
    """Cut the first `tokens` ids into (1, length) windows; the last may be shorter, but has at least 2."""
    ids = token_ids.reshape(-1)[:tokens]
    return [part[None] for part in torch.split(ids, length) if part.numel() > 1]


@dataclass(frozen=True)
class Fidelity:
    """Next-token distributions of a model against its reference, over `tokens` predictions.

    Attributes:
        tokens: number of predictions.
        kl_mean: mean of KL(reference || model), in nats.
        kl_mean_error: its standard error.
        kl_median: its median.
        kl_p99: its 99th percentile.
        kl_max: its maximum.
        top1: share of predictions with the same most likely token.
        top5: mean share of the reference's five most likely tokens that are among the model's five.
        reference_perplexity: perplexity of the text under the reference.
        perplexity: perplexity of the text under the model.
        log_perplexity_error: standard error of the reference's log perplexity.
        log_ratio: log of perplexity over reference_perplexity.
        log_ratio_error: its standard error, from the differences token by token.

    """

    tokens: int
    kl_mean: float
    kl_mean_error: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: float
    top5: float
    reference_perplexity: float
    perplexity: float
    log_perplexity_error: float
    log_ratio: float
    log_ratio_error: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: one value per prediction, in tensors of the same length.

    Attributes:
        kl: KL(reference || model), in nats.
        top: the reference's most likely token.
        other_top: the model's most likely token.
        top5: share of the reference's five most likely tokens among the model's.
        loss: negative log probability of the text's own token under the reference.
        other_loss: the same under the model.

    """

    kl: Tensor
    top: Tensor
    other_top: Tensor
    top5: Tensor
    loss: Tensor
    other_loss: Tensor

    @staticmethod
    def join(parts: Sequence[Comparison]) -> Comparison:
        """Concatenate comparisons."""
        return Comparison(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Comparison)))

    def summary(self) -> Fidelity:
        """Return the figures over all predictions."""
        n = self.kl.numel()
        ratio = self.other_loss - self.loss
        return Fidelity(
            tokens=n,
            kl_mean=float(self.kl.mean()),
            kl_mean_error=standard_error(self.kl),
            kl_median=float(self.kl.median()),
            kl_p99=float(self.kl.quantile(0.99)),
            kl_max=float(self.kl.max()),
            top1=float((self.top == self.other_top).double().mean()),
            top5=float(self.top5.mean()),
            reference_perplexity=float(self.loss.mean().exp()),
            perplexity=float(self.other_loss.mean().exp()),
            log_perplexity_error=standard_error(self.loss),
            log_ratio=float(ratio.mean()),
            log_ratio_error=standard_error(ratio),
        )


@dataclass(frozen=True)
class Similarity:
    """Last hidden states of a model against its reference's.

    Attributes:
        tokens: 1 - cosine between the two states of each token.
        embeddings: 1 - cosine between the two means of each window's states, which sentence encoders return.

    """

    tokens: Tensor
    embeddings: Tensor

    @staticmethod
    def of(expected: Tensor, got: Tensor) -> Similarity:
        """Compare the states of one window, (tokens, hidden)."""
        a, b = expected.double(), got.double()
        return Similarity(_distance(a, b), _distance(a.mean(0, keepdim=True), b.mean(0, keepdim=True)))

    @staticmethod
    def join(parts: Sequence[Similarity]) -> Similarity:
        """Concatenate comparisons."""
        return Similarity(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Similarity)))

    def summary(self) -> dict[str, float]:
        """The figures: cosines, and how far they are from 1."""
        return {
            "tokens": self.tokens.numel(),
            "distance_mean": float(self.tokens.mean()),
            "distance_p99": float(self.tokens.quantile(0.99)),
            "distance_max": float(self.tokens.max()),
            "embeddings": self.embeddings.numel(),
            "embedding_distance_mean": float(self.embeddings.mean()),
            "embedding_distance_max": float(self.embeddings.max()),
        }


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - cosine of rows, from the difference of unit vectors: exactly 0 where both are equal."""
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    return (a - b).square().sum(-1) / 2


def standard_error(x: Tensor) -> float:
    """Return the standard error of a mean; nan for one value."""
    return float(x.std() / x.numel() ** 0.5) if x.numel() > 1 else float("nan")


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Return the log probabilities of every next token within the text: float32, (length - 1, vocabulary)."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1)


def compare(p: Tensor, q: Tensor, ids: Tensor) -> Comparison:
    """Compare the log probabilities of a reference and a model on one window of token ids, (1, length)."""
    return compare_predictions(p, q, ids[0, 1:])


def compare_predictions(p: Tensor, q: Tensor, targets: Tensor) -> Comparison:
    """Compare the log probabilities of a reference and a model, (n, vocabulary), at n tokens of the text."""
    target = targets[:, None]
    five, other = p.topk(min(5, p.shape[-1]), -1).indices, q.topk(min(5, q.shape[-1]), -1).indices
    return Comparison(
        kl=(p.exp() * (p - q)).sum(-1, dtype=torch.float64).clamp_min(0.0),
        top=p.argmax(-1),
        other_top=q.argmax(-1),
        top5=(five[:, :, None] == other[:, None, :]).any(-1).double().mean(-1),
        loss=-p.gather(1, target)[:, 0].double(),
        other_loss=-q.gather(1, target)[:, 0].double(),
    )


def fidelity(reference: Any, model: Any, ids: Iterable[Tensor], advance: Any = None) -> Fidelity:
    """Compare two causal language models on windows of token ids, each of shape (1, length)."""
    parts = []
    for window in ids:
        parts.append(compare(log_probabilities(reference, window), log_probabilities(model, window), window))
        if advance is not None:
            advance(window.numel())
    return Comparison.join(parts).summary()


@torch.no_grad()
def greedy(model: Any, ids: Tensor, tokens: int, argument: str = "input_ids", **more: Any) -> tuple[Tensor, float]:
    """Generate exactly `tokens` greedy tokens after a prompt.

    Args:
        model: a model with a KV cache.
        ids: the prompt, (1, length).
        tokens: how many to generate.
        argument: name of the forward argument that takes the ids.
        **more: other arguments of forward.

    Returns:
        the tokens, and tokens per second of decoding, without the prefill.

    """
    out = model(**{argument: ids}, use_cache=True, **more)
    produced = [out.logits[:, -1].argmax(-1, keepdim=True)]
    begin = time.perf_counter()
    for _ in range(tokens - 1):
        out = model(**{argument: produced[-1]}, past_key_values=out.past_key_values, use_cache=True, **more)
        produced.append(out.logits[:, -1].argmax(-1, keepdim=True))
    seconds = time.perf_counter() - begin
    return torch.cat(produced, 1)[0], (tokens - 1) / seconds if tokens > 1 else float("nan")


def bytes_by_component(model: torch.nn.Module) -> dict[str, int]:
    """Return bytes of parameters and buffers by kind of module; shared storage counts once."""
    sizes: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            kind = "linear layers"
        elif isinstance(module, torch.nn.Embedding):
            kind = "embeddings"
        elif isinstance(module, QINSExperts) or projections(module):
            kind = "experts"
        else:
            kind = "norms and the rest"
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for t in tensors:
            key = (t.untyped_storage().data_ptr(), int(t.storage_offset()))
            if key not in seen:
                seen.add(key)
                sizes[kind] = sizes.get(kind, 0) + t.numel() * t.element_size()
    return sizes
