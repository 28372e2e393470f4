"""Other ways to store a weight in about 8 bits, as the floats that they decode to: what fidelity is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Peer:
    """A format.

    Attributes:
        name: what tables call it.
        decoded: (N, K) float32 weights to the float32 values that the format gives back.
        bits: of a weight, everything included, for in_features.

    """

    name: str
    decoded: Callable[[Tensor], Tensor]
    bits: Callable[[int], float]


def _blocks(w: Tensor, size: int) -> Tensor:
    """(N, K) to (N, blocks, size); the last block of a row is filled up with zeros."""
    return torch.nn.functional.pad(w, (0, -w.shape[1] % size)).view(w.shape[0], -1, size)


def _int8_row(w: Tensor) -> Tensor:
    """Symmetric int8 with a float32 scale a row, as torchao's, quanto's and bitsandbytes' weight-only int8."""
    scale = w.abs().amax(1, keepdim=True) / 127
    return (w / scale.clamp_min(1e-30)).round().clamp(-127, 127) * scale


def _q8_0(w: Tensor) -> Tensor:
    """llama.cpp's Q8_0: int8 with a float16 scale for every 32 weights."""
    blocks = _blocks(w, 32)
    scale = blocks.abs().amax(2, keepdim=True) / 127
    # rounded under the float32 scale, decoded with the float16 one, as llama.cpp does
    values = (blocks / scale.clamp_min(1e-30)).round() * scale.half().float()
    return values.view(w.shape[0], -1)[:, : w.shape[1]].contiguous()


def _hqq(w: Tensor) -> Tensor:
    """Asymmetric uint8 with a float16 scale and zero point for every 64 weights, as HQQ's 8 bits; no optimization."""
    blocks = _blocks(w, 64)
    low, high = blocks.amin(2, keepdim=True), blocks.amax(2, keepdim=True)
    scale = ((high - low) / 255).half().float().clamp_min(1e-30)
    zero = (-low / scale).half().float()
    values = ((blocks / scale + zero).round().clamp(0, 255) - zero) * scale
    return values.view(w.shape[0], -1)[:, : w.shape[1]].contiguous()


def _fp8(w: Tensor) -> Tensor:
    """float8 e4m3 with a float32 scale a row."""
    scale = (w.abs().amax(1, keepdim=True) / 448).clamp_min(1e-30)
    return (w / scale).to(torch.float8_e4m3fn).float() * scale


def _bf16(w: Tensor) -> Tensor:
    return w.bfloat16().float()


PEERS = {
    p.name: p
    for p in (
        Peer("int8 per row", _int8_row, lambda k: 8 + 32 / k),
        Peer("Q8_0", _q8_0, lambda k: 8 * 34 * -(-k // 32) / k),
        Peer("uint8 per 64", _hqq, lambda k: 8 + 32 * -(-k // 64) / k),
        Peer("fp8 e4m3 per row", _fp8, lambda k: 8 + 32 / k),
        Peer("bf16 weights", _bf16, lambda k: 16.0),
    )
}
