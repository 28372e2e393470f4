"""What a subclass of nn.Embedding computes from the rows it looks up: times a factor, plus a bias, or something else.

The module finds out by running the class's forward once, on a small weight of known numbers.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16)


class Affine(NamedTuple):
    """An affine transform of embedding rows.

    Attributes:
        factor: multiplies the rows.
        rounds_factor: whether the factor is first rounded to the rows' dtype.

    """

    factor: float = 1.0
    rounds_factor: bool = False

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the rows times the factor, plus the bias."""
        if self.factor != 1.0:
            rows = rows * (float(torch.tensor(self.factor, dtype=rows.dtype)) if self.rounds_factor else self.factor)
        return rows if bias is None else rows + bias.to(rows.dtype)


def affine(module: nn.Embedding, *, form_only: bool = False) -> Affine:
    """Determine what an embedding computes.

    Args:
        module: on any device; its weight is not read.
        form_only: accept buffers on the meta device, whose values are unknown; the returned factor is then meaningless.

    Returns:
        the transform of its rows.

    Raises:
        ValueError: it does not compute rows times a factor plus its `bias`; the message says why.

    """
    kind = type(module)
    if kind is nn.Embedding:
        return Affine()
    try:
        with torch.no_grad(), torch.device("cpu"):  # while a model loads, the default device here is meta
            return _proved(module, form_only)
    except ValueError as e:
        reason = str(e)
    except Exception as e:  # a third party's forward may raise anything
        reason = f"its forward raises {type(e).__name__}: {e}"
    raise ValueError(f"a {kind.__name__}, which may compute something other than rows times a factor: {reason}")


def _proved(module: nn.Embedding, form_only: bool) -> Affine:
    inner = next((n for n, _ in module.named_children()), None)
    more = sorted({*dict(module.named_parameters(recurse=False)), *_saved_buffers(module)} - {"weight", "bias"})
    if inner or more:
        raise ValueError(f"it has {inner or more[0]}")
    rows, columns = module.num_embeddings, module.embedding_dim
    if not rows or not columns:
        raise ValueError(f"it has {rows} rows of {columns} columns")
    # overlapping rows: all are distinct, in the memory of one row and one column
    numbers = torch.sin(torch.arange(rows + columns, dtype=torch.float64) * 1.7)
    weight = numbers.as_strided((rows, columns), (1, 1))
    padding = module.padding_idx if module.padding_idx is not None else 0
    ids = torch.tensor([[0, padding, rows // 2], [rows - 1, 0, min(1, rows - 1)]])
    bias = None
    if module._parameters.get("bias") is not None:
        bias = torch.cos(torch.arange(columns, dtype=torch.float64))
    ones = torch.ones(1, 1, dtype=torch.float64).expand(rows, columns)
    no_bias = None if bias is None else torch.zeros_like(bias)
    factors = _run(module, ids, ones, no_bias, form_only).double()
    factor = float(factors.flatten()[0])
    found = None
    for rounds in (False, True):
        form = Affine(factor, rounds)
        if found is None and all(_agrees(module, form, ids, weight, bias, form_only, d) for d in _DTYPES):
            found = form
    if found is None:
        raise ValueError("it returned other numbers in a trial")
    return found


def _agrees(
    module: nn.Embedding,
    form: Affine,
    ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    form_only: bool,
    dtype: torch.dtype,
) -> bool:
    weight, bias = _strided(weight, dtype), None if bias is None else bias.to(dtype)
    got = _run(module, ids, weight, bias, form_only)
    want = form(nn.functional.embedding(ids, weight), bias)
    return got.dtype == want.dtype and torch.equal(got, want)


def _strided(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a matrix of overlapping rows to another dtype, with the same overlap."""
    rows, columns = weight.shape
    whole = weight.as_strided((rows + columns,), (1,)).to(dtype)
    return whole.as_strided((rows, columns), (1, 1))


def _saved_buffers(module: nn.Module) -> set[str]:
    return set(module._buffers) - module._non_persistent_buffers_set


def _run(
    module: nn.Embedding, ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, form_only: bool
) -> torch.Tensor:
    """Return what the class's forward computes with these in place of the module's own."""
    probe = copy.copy(module)  # with its own dictionaries, so that the module stays unchanged
    for name in ("_parameters", "_buffers"):
        probe.__dict__[name] = dict(module.__dict__[name])
    probe.__dict__["training"] = True  # dropout would show
    probe._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        probe._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            probe._buffers[name] = _real(module, name, buffer, form_only)
    out: torch.Tensor = type(module).forward(probe, ids)
    return out


def _real(module: nn.Module, name: str, buffer: torch.Tensor, form_only: bool) -> torch.Tensor:
    """Return a buffer as it is, or as it will be once the model has left the meta device."""
    if not buffer.is_meta:
        return buffer.cpu()
    # transformers fills embed_scale with scalar_embed_scale
    value = getattr(module, f"scalar_{name}", None)
    if value is None and not form_only:
        raise ValueError(f"its {name} is on the meta device")
    return torch.full(buffer.shape, 3.7 if value is None else value, dtype=buffer.dtype)
