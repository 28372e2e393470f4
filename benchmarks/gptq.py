"""int4 by GPTQ (Frantar et al., 2022, arXiv:2210.17323), as the floats that it dequantizes to.

    python benchmarks/gptq.py  # output errors of the variants on one layer

The published algorithm: columns are rounded one after another, and the error of each is subtracted from those after it,
by the Cholesky factor of the inverse second moments of the inputs. Damping is 1 % of the mean second moment. Columns go
by descending second moment, with the groups' scales found beforehand ("act-order" with "static groups"). Scales come
from each group's largest and smallest weight, or from a search for a smaller range with less error, as under the
authors' --mse. With equal scales, llm-compressor 0.14 gives the same values; it is not used here because its
installation replaces the transformers that is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

BITS, DAMPING = 4, 0.01
_BLOCK = 128
_SHRINKS = [1 - i / 100 for i in range(1, 50)]
_NORM = 2.4  # the power of errors that the authors' search for a range minimizes


@dataclass(frozen=True)
class Variant:
    """How GPTQ rounds.

    Attributes:
        group_size: consecutive columns that share a scale.
        symmetric: whether levels are -8 to 7 times a scale, instead of 0 to 15 less a zero point.
        search: whether to search for each group's range.

    """

    group_size: int = 128
    symmetric: bool = False
    search: bool = True

    def bits(self, in_features: int) -> float:
        """Return bits per weight, with a float16 scale, and a zero point of 4 bits if there is one."""
        per_group = 16 if self.symmetric else 16 + BITS
        return BITS + per_group * -(-in_features // self.group_size) / in_features


def rounded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the nearest values of the levels 0 to 15."""
    return scale * ((x / scale).round().add(zero).clamp(0, 2**BITS - 1) - zero)


def grid(group: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (N,) of each output, for the weights of a group, (group_size, N)."""
    low, high = group.amin(0).clamp_max(0), group.amax(0).clamp_min(0)
    if variant.symmetric:
        high = torch.maximum(-low, high)
        low = -high

    def of_range(share: float) -> tuple[Tensor, Tensor]:
        scale = ((high - low) * share / (2**BITS - 1)).half().float()
        scale = torch.where(scale > 0, scale, 1.0)
        zero = torch.full_like(scale, 2 ** (BITS - 1)) if variant.symmetric else (-low * share / scale).round()
        return scale, zero.clamp(0, 2**BITS - 1)

    scale, zero = of_range(1.0)
    least = (rounded(group, scale, zero) - group).abs().pow(_NORM).sum(0)
    for share in _SHRINKS if variant.search else ():
        found = of_range(share)
        error = (rounded(group, *found) - group).abs().pow(_NORM).sum(0)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, found[0], scale), torch.where(better, found[1], zero)
    return scale, zero


def quantized(weight: Tensor, gram: Tensor, variant: Variant) -> Tensor:
    """Return the dequantized values of a layer's weight.

    Args:
        weight: (N, K), float32.
        gram: (K, K), second moments of the layer's inputs.
        variant: how to round.

    """
    cols = weight.shape[1]
    h = gram.double()
    unused = h.diagonal() == 0
    h = h + torch.diag(unused.double())
    h = h + DAMPING * h.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    w = weight.T.masked_fill(unused[:, None], 0.0)  # (K, N): what is rounded at a time is contiguous
    grids = [grid(group, variant) for group in w.split(variant.group_size)]
    w = w[order]
    values = torch.empty_like(w)
    for begin in range(0, cols, _BLOCK):
        end = min(begin + _BLOCK, cols)
        errors = torch.empty_like(w[begin:end])
        for j in range(begin, end):
            values[order[j]] = value = rounded(w[j], *grids[int(order[j]) // variant.group_size])
            errors[j - begin] = error = (w[j] - value) / factor[j, j]
            w[j:end] -= factor[j, j:end, None] * error
        w[end:] -= factor[begin:end, end:].T @ errors
    return values.T.contiguous()


def main() -> None:
    """Print the output error of each variant on a layer whose inputs are correlated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.manual_seed(0)
    w = torch.randn(256, 512) * 0.02
    x = torch.randn(4096, 64) @ torch.randn(64, 512) / 8 + torch.randn(4096, 512)
    gram = x.T @ x
    for symmetric in (False, True):
        for search in (False, True):
            variant = Variant(symmetric=symmetric, search=search)
            error = quantized(w, gram, variant) - w
            share = float((error @ gram * error).sum() / (w @ gram * w).sum())
            print(f"{variant}: {variant.bits(512):.3f} bits, {share:.2e} of the outputs' energy")


if __name__ == "__main__":
    main()
