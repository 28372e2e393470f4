"""What a conversion records so that the source can be restored; see files/exact.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..codec import EncodedArray
from ..files import Checkpoint, ExactRecorder
from .planning import Item, Output, Plan


class ItemRecorder:
    """Records the items of one file of the source, and where the bits of each of their tensors are."""

    def __init__(
        self, checkpoint: Checkpoint, planned: Plan, file: Path, target: Path, others: dict[str, Any] | None = None
    ) -> None:
        self.checkpoint, self.planned, self.file, self.others = checkpoint, planned, file, others or {}
        self.exact = ExactRecorder(checkpoint, file, target)
        self.rows: dict[str, tuple[str, int, int]] = {}  # tensor to layer, matrix and first row, of merged experts

    def __enter__(self) -> ItemRecorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.exact.close()

    def matrix(self, item: Item, output: Output, part: int | None, floats: torch.Tensor, codes: EncodedArray) -> None:
        """Record a matrix's residual; `part`: its index in a stack."""
        if item.converter is not None:
            rows = self._sources(item, output, part, floats)
            if rows is None:
                return
            self.rows |= rows
        self.exact.matrix(output.stem[:-1], part, floats.T if output.transposed else floats, codes)

    def _sources(
        self, item: Item, output: Output, part: int | None, floats: torch.Tensor
    ) -> dict[str, tuple[str, int, int]] | None:
        """Return the tensors whose rows, one below the other, are a matrix of a stack; None if none are.

        transformers' conversions may do anything, so what they did is found by comparing bits: experts are merged in
        order, and the projections of one expert concatenated.
        """
        keys = [named[part] for named in item.keys.values() if part is not None and part < len(named)]
        tensors = [self.checkpoint.load(k) for k in keys]
        if output.transposed or len(tensors) != len(item.keys) or any(t.dtype != floats.dtype for t in tensors):
            return None
        if any(t.dim() != 2 or t.shape[1] != floats.shape[1] for t in tensors):
            return None
        whole = torch.cat(tensors)
        if whole.shape != floats.shape or not same_bits(whole, floats):
            return None
        found, row = {}, 0
        for key, tensor in zip(keys, tensors, strict=True):
            found[key] = (output.stem[:-1], part or 0, row)
            row += len(tensor)
        return found

    def item(self, item: Item) -> None:
        """Record where the bits of an item's tensors are."""
        for key in item.all_keys:
            floats = next((o for o in item.outputs if not o.codec and item.converter is None), None)
            if floats is not None:
                self.exact.stored(key, floats.stem)
            elif item.converter is None:
                self.exact.layer(key, item.outputs[0].stem[:-1], item.outputs[0].transposed)
            elif key in self.rows:
                layer, part, row = self.rows[key]
                self.exact.layer(key, layer, False, part, row)
            else:
                self.exact.raw(key)

    def write(self) -> None:
        """Write the file."""
        planned = {k for items in self.planned.items.values() for item in items for k in item.all_keys}
        for key, tensor in self.checkpoint.tensors.items():
            if key not in planned and self.checkpoint.where(key) == self.file:
                # a stored copy of a tied embedding, which the conversion dropped
                others = (k for k in planned if self.checkpoint.tensors[k].shape == tensor.shape)
                loaded = self.checkpoint.load(key)
                same = next((k for k in sorted(others) if same_bits(self.checkpoint.load(k), loaded)), None)
                if same is None:
                    self.exact.raw(key)
                else:
                    self.exact.copy(key, same)
        self.exact.write(self.others)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype and the same bits, NaN and -0 included."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
