"""Encoding experts one by one while transformers 5 loads a checkpoint that has each in tensors of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps

from ._hf_modules import PendingExperts
from ._pages import give_back_freed_memory, page_out


class EncodeExperts(ConversionOps):
    """Takes the place of operations that stack experts' tensors and join or turn the stacks.

    They are run on one expert at a time, and its matrix is encoded before the next one's turn; a module whose experts
    stay floats gets them run as they are.
    """

    def __init__(self, operations: list[ConversionOps]) -> None:
        """Keep the operations."""
        self.operations = operations

    def _run(self, tensors: dict[str, Any], patterns: dict[str, Any]) -> dict[str, Any]:
        for operation in self.operations:
            tensors = operation.convert(tensors, **patterns)
        return tensors

    def _one(self, tensors: dict[str, Any], patterns: dict[str, Any]) -> torch.Tensor:
        (merged,) = self._run(tensors, patterns).values()
        stack: torch.Tensor = merged[0] if isinstance(merged, list) else merged
        return stack[0]

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the codes by full name, or what the operations return."""
        name, model = kwargs["full_layer_name"], kwargs["model"]
        path, _, stack = name.rpartition(".")
        module = model.get_submodule(path)
        counts = {len(tensors) if isinstance(tensors, list) else 0 for tensors in input_dict.values()}
        if not isinstance(module, PendingExperts) or stack not in module.waiting or len(counts) != 1 or 0 in counts:
            return self._run(input_dict, kwargs)

        def matrices() -> Iterator[torch.Tensor]:
            for i in range(counts.pop()):
                yield self._one({k: tensors[i][None] for k, tensors in input_dict.items()}, kwargs)
                for tensors in input_dict.values():
                    page_out(tensors[i])
                    tensors[i] = None

        try:
            codes = module.accept(stack, matrices())
        except ValueError as e:
            raise ValueError(f"{path}.{e}") from None
        give_back_freed_memory()  # the floats' pieces, which lie between codes that stay
        if kwargs.get("missing_keys") is not None:
            kwargs["missing_keys"].discard(name)
        return {f"{path}.{n}": t for n, t in codes.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: converters are dropped before a quantised model is saved."""
        raise NotImplementedError
