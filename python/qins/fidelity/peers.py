"""Peers: other 8-bit formats and bfloat16, as the floats that they dequantize to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Peer:
    """A format to compare with.

    Attributes:
        name: its name in tables.
        decoded: maps (N, K) float32 weights to their dequantized float32 values.
        bits: maps in_features to bits per weight, scales included.

    """

    name: str
    decoded: Callable[[Tensor], Tensor]
    bits: Callable[[int], float]


def _blocks(w: Tensor, size: int) -> Tensor:
    """Reshape (N, K) to (N, blocks, size); the last block of a row is padded with zeros."""
    return torch.nn.functional.pad(w, (0, -w.shape[1] % size)).view(w.shape[0], -1, size)


def _int8_row(w: Tensor) -> Tensor:
    """Symmetric int8 with a float32 scale per row, as in weight-only int8 of torchao, quanto and bitsandbytes."""
    scale = w.abs().amax(1, keepdim=True) / 127
    return (w / scale.clamp_min(1e-30)).round().clamp(-127, 127) * scale


def _q8_0(w: Tensor) -> Tensor:
    """llama.cpp's Q8_0: int8 with a float16 scale per 32 weights."""
    blocks = _blocks(w, 32)
    scale = blocks.abs().amax(2, keepdim=True) / 127
    # as in llama.cpp: rounded with the float32 scale, dequantized with the float16 one
    values = (blocks / scale.clamp_min(1e-30)).round() * scale.half().float()
    return values.view(w.shape[0], -1)[:, : w.shape[1]].contiguous()


def _hqq(w: Tensor) -> Tensor:
    """Asymmetric uint8 with a float16 scale and zero point per 64 weights, as HQQ's 8 bits without its optimization."""
    blocks = _blocks(w, 64)
    low, high = blocks.amin(2, keepdim=True), blocks.amax(2, keepdim=True)
    scale = ((high - low) / 255).half().float().clamp_min(1e-30)
    zero = (-low / scale).half().float()
    values = ((blocks / scale + zero).round().clamp(0, 255) - zero) * scale
    return values.view(w.shape[0], -1)[:, : w.shape[1]].contiguous()


def _fp8(w: Tensor) -> Tensor:
    """float8 e4m3 with a float32 scale per row."""
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
