"""Dequantization of whole models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn import (
    QINSEmbedding,
    QINSExperts,
    QINSLinear,
)
from .parallel import is_parallel


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Replace quantized modules with float ones, in place; return the model."""
    if isinstance(dtype, str):  # a copied config has the dtype's name
        dtype = getattr(torch, dtype)
    if is_parallel(model):
        raise ValueError("dequantize: this rank has only its part of the codes, expected a model on one rank")
    for name, module in list(model.named_modules()):
        new: nn.Module
        if isinstance(module, QINSExperts):
            new = module.to_float(dtype)
        elif isinstance(module, QINSLinear):
            with torch.device("meta"):
                new = nn.Linear(module.in_features, module.out_features, bias=False)
            new.weight = nn.Parameter(module.weight.to(dtype or module.weight_dtype))
            new.bias = module.bias
        elif isinstance(module, QINSEmbedding):
            new = module.to_float(dtype)
        else:
            continue
        model.set_submodule(name, new.train(module.training))
    return model
