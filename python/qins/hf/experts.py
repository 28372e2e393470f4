"""Encoding experts one by one while transformers 5 loads a checkpoint with separate tensors per expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, MergeModulelist

from ..system import give_back_freed_memory, let_go
from .modules import PendingExperts

# Matrices of at least this many bytes are returned to the system at once: that costs little next to encoding them.
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
    """Run operations that stack experts' tensors and concatenate or transpose the stacks, one expert at a time.

    Args:
        operations: operations of a transformers weight converter.
        parts: pattern to one handle per expert, which `load` turns into a tensor.
        load: returns the tensor of a handle; its pages are released after use.
        patterns: keyword arguments of the operations.

    Returns:
        each expert's matrix in turn; None if the operations are of another kind.

    """
    counts = {len(p) for p in parts.values()}
    merge, targets = operations[0], patterns["target_patterns"]
    if type(merge) is not MergeModulelist or merge.dim != 0 or len(counts) != 1:
        return None

    def of_one(merged: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the remaining operations on stacks of one; merging these would only copy them."""
        (stack,) = _run(operations[1:], merged, patterns).values()
        matrix: torch.Tensor = (stack[0] if isinstance(stack, list) else stack)[0]
        return matrix

    def matrices() -> Iterator[torch.Tensor]:
        for i in range(counts.pop()):
            tensors = {pattern: load(p[i]) for pattern, p in parts.items()}
            yield of_one({targets[0] if len(parts) == 1 else p: t[None] for p, t in tensors.items()})
            for t in tensors.values():
                let_go(t)
            if sum(t.nbytes for t in tensors.values()) >= _WORTH_GIVING_BACK:
                give_back_freed_memory()  # the matrix may be between codes that stay in memory

    return matrices()


class EncodeExperts(ConversionOps):
    """Replacement for operations that stack experts' tensors and concatenate or transpose the stacks.

    It runs them on one expert at a time and encodes its matrix before the next one. If a module's experts stay float,
    it runs the operations unchanged.
    """

    def __init__(self, operations: list[ConversionOps]) -> None:
        """Store the operations to replace."""
        self.operations = operations

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the codes by full name, or the operations' result if the experts stay float."""
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
