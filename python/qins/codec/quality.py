"""The quality of codes."""

from __future__ import annotations

import math


def snr_db(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise) of two sums of squares: infinite without noise."""
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf
