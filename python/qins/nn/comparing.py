"""The error of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..codec import EncodedArray, snr_db


class WeightComparison:
    """Compares weights with their codes, a few rows at a time.

    The working memory is allocated once. Allocating and freeing it between codes that stay allocated would fragment the
    heap to many times the size of the codes.
    """

    def __init__(self, elements: int = 1 << 20) -> None:
        self._floats, self._decoded = torch.empty(elements), torch.empty(elements)

    def snr_db(self, weight: torch.Tensor, e: EncodedArray) -> float:
        """Return the signal-to-noise ratio of a matrix's codes: infinite if they are exact."""
        return snr_db(*self._squares(weight, e))

    def stack_snr_db(self, weights: torch.Tensor, encoded: Callable[[int], EncodedArray]) -> float:
        """Return the signal-to-noise ratio of a stack of matrices, from the codes of each."""
        squares = [self._squares(w, encoded(i)) for i, w in enumerate(weights)]
        return snr_db(sum(s for s, _ in squares), sum(n for _, n in squares))

    def _squares(self, weight: torch.Tensor, e: EncodedArray) -> tuple[float, float]:
        """Return the sums of squares of a matrix and of its codes' errors."""
        weight = weight.detach()
        signal = noise = 0.0
        elements = self._floats.numel()
        width = max(1, min(weight.shape[1], elements))
        height = max(1, elements // width)
        for row in range(0, weight.shape[0], height):
            for col in range(0, weight.shape[1], width):
                part = weight[row : row + height, col : col + width]
                floats, decoded = (t[: part.numel()] for t in (self._floats, self._decoded))
                floats.view(part.shape).copy_(part)
                e.decode_block(decoded.view(part.shape).numpy(), "float32", row, col)
                decoded.sub_(floats)
                signal += float(floats.dot(floats))
                noise += float(decoded.dot(decoded))
        return signal, noise
