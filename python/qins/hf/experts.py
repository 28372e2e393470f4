"""Encoding experts one by one while transformers 5 loads a checkpoint that has each in tensors of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, MergeModulelist

from ..system import give_back_freed_memory, page_out
from .modules import PendingExperts

# Bytes of a matrix above which it is given back to the system at once: that takes a small part of encoding it.
_WORTH_GIVING_BACK = 4 << 20


def _run(operations: list[ConversionOps], tensors: dict[str, Any], patterns: dict[str, Any]) -> dict[str, Any]:
    for operation in operations:
        tensors = operation.convert(tensors, **patterns)
    return tensors


def one_by_one(
    operations: list[ConversionOps],
    parts: dict[str, list[Any]],
    load: Callable[[Any], torch.Tensor],
    patterns: dict[str, Any],
) -> Iterator[torch.Tensor] | None:
    """Run operations that stack experts' tensors and join or turn the stacks on one expert at a time.

    Args:
        operations: a converter's.
        parts: by pattern what stands for each expert's tensor.
        load: gives the tensor, whose pages are let go afterwards.
        patterns: what the operations want to know.

    Returns:
        the matrix that each expert gets; None if the operations are not of this kind.

    """
    counts = {len(p) for p in parts.values()}
    merge, targets = operations[0], patterns["target_patterns"]
    if type(merge) is not MergeModulelist or merge.dim != 0 or len(counts) != 1:
        return None

    def of_one(merged: dict[str, torch.Tensor]) -> torch.Tensor:
        """The rest of the operations, on stacks of one; merging these would only copy them."""
        (stack,) = _run(operations[1:], merged, patterns).values()
        matrix: torch.Tensor = (stack[0] if isinstance(stack, list) else stack)[0]
        return matrix

    def matrices() -> Iterator[torch.Tensor]:
        for i in range(counts.pop()):
            tensors = {pattern: load(p[i]) for pattern, p in parts.items()}
            yield of_one({targets[0] if len(parts) == 1 else p: t[None] for p, t in tensors.items()})
            for t in tensors.values():
                page_out(t)
            if sum(t.nbytes for t in tensors.values()) >= _WORTH_GIVING_BACK:
                give_back_freed_memory()  # the matrix, which may lie between codes that stay

    return matrices()


class EncodeExperts(ConversionOps):
    """Takes the place of operations that stack experts' tensors and join or turn the stacks.

    They are run on one expert at a time, and its matrix is encoded before the next one's turn; a module whose experts
    stay floats gets them run as they are.
    """

    def __init__(self, operations: list[ConversionOps]) -> None:
        """Keep the operations."""
        self.operations = operations

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the codes by full name, or what the operations return."""
        name, model = kwargs["full_layer_name"], kwargs["model"]
        path, _, stack = name.rpartition(".")
        module = model.get_submodule(path)
        matrices = None
        if isinstance(module, PendingExperts) and stack in module.waiting:
            matrices = one_by_one(self.operations, input_dict, lambda t: t, kwargs)
        if matrices is None:
            return _run(self.operations, input_dict, kwargs)
        try:
            codes = module.accept(stack, matrices)
        except ValueError as e:
            raise ValueError(f"{path}.{e}") from None
        if kwargs.get("missing_keys") is not None:
            kwargs["missing_keys"].discard(name)
        return {f"{path}.{n}": t for n, t in codes.items()}
