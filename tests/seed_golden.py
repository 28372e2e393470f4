"""The prototype's (seed's) float32 arithmetic for golden, for comparison in tests and benchmarks."""

from __future__ import annotations

import torch


def seed_encode(w: torch.Tensor):
    """Return stored, sign, log_min and log_max."""
    sign = torch.sign(w)
    sign[sign == 0] = 1
    magnitude = w.abs().clamp(min=1e-8)
    large = w.abs() > 1e-8
    logs = torch.log(magnitude)
    if not large.any():
        low, high = torch.tensor(-10.0), torch.tensor(0.0)
        return torch.full_like(w, 128, dtype=torch.uint8), sign.to(torch.int8), low, high
    low, high = logs[large].min(), logs[large].max()
    if high - low < 1e-8:
        return torch.full_like(w, 128, dtype=torch.uint8), sign.to(torch.int8), low, low
    normalized = (logs - low) / (high - low)
    stored = (255.0 - normalized * 254.0).round().clamp(1, 255).to(torch.uint8)
    return stored, sign.to(torch.int8), low, high


def seed_decode(stored, sign, low, high):
    """Return float32 weights."""
    normalized = (255.0 - stored.float()) / 254.0
    return sign.float() * torch.exp(low + normalized * (high - low))
