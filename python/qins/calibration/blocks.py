"""Skipping the blocks of a model that a pass does not need, by resuming from saved hidden states.

A round of calibration concerns a few layers. It saves the hidden states where it ends, so the next round need not run
the blocks before them. That is correct only if a block receives nothing from its predecessor but the predecessor's
output. This is checked, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


def _blocks(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Return the blocks of the only ModuleList that holds any of these layers; empty unless exactly one does."""
    wanted = set(layers)
    found: list[list[nn.Module]] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            if any(m in wanted for m in module.modules()):
                found.append(list(module))
            inside.update(module.modules())
    return found[0] if len(found) == 1 else []


class BlockChain:
    """The blocks of a model in sequence, and each batch's saved hidden states.

    Args:
        model: any model.
        layers: the layers to calibrate.
        first: where a batch's next pass resumes. True: at the block of the first layer of the previous round, which is
            necessary if the layers of that round have changed since. False: at the block of its last layer.

    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module], first: bool) -> None:
        self.blocks = _blocks(model, list(layers))
        self.usable = len(self.blocks) > 1
        self.first = first
        self._saved: dict[int, tuple[int, Tensor]] = {}
        self._tuples: dict[int, int] = {}  # block to the length of the tuple that it returns
        self._current: tuple[int, Tensor] | None = None
        self._marked: tuple[int, Tensor] | None = None
        self._out: Any = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follow the hidden states within the block."""
        hooks: list[Any] = []
        for i, block in enumerate(self.blocks):
            hooks.append(
                block.register_forward_pre_hook(lambda _m, a, k, i=i: self._enter(i, a, k), with_kwargs=True)
            )  # fmt: skip
            hooks.append(block.register_forward_hook(lambda _m, _a, out, i=i: self._leave(i, out)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or (i > 0 and hidden is not self._out):
            self.usable = False
        else:
            self._current = i, hidden

    def _leave(self, i: int, out: Any) -> None:
        if isinstance(out, tuple) and not any(isinstance(o, Tensor) for o in out[1:]):
            self._out, self._tuples[i] = out[0], len(out)
        else:
            self._out = out

    def mark(self) -> None:
        """Note that a layer of this round is running."""
        if self._marked is None or not self.first:
            self._marked = self._current

    def run(self, batch: int, forward: Callable[[], Any], *, whole: bool = False, keep: bool = True) -> None:
        """Make a pass with a batch, resumed or `whole`; `keep` saves the state from which the next pass resumes."""
        self._marked = self._current = self._out = None
        start = None if whole or not self.usable else self._saved.get(batch)
        replaced = self.blocks[: start[0]] if start else []
        own = {b: b.__dict__.get("forward") for b in replaced}
        for i, block in enumerate(replaced):
            assert start is not None
            block.forward = self._passing(i, start[1])
        try:
            forward()
        finally:
            for block, method in own.items():
                if method is None:
                    del block.forward
                else:
                    block.forward = method
            if keep and self._marked is not None:  # a pass that ends early ends by an exception
                self._saved[batch] = self._marked

    def _passing(self, i: int, hidden: Tensor) -> Callable[..., Any]:
        length = self._tuples.get(i)
        out = hidden if length is None else (hidden, *[None] * (length - 1))
        return lambda *args, **kwargs: out

    def skips(self, batch: int) -> bool:
        """Return whether the batch's next pass would skip blocks."""
        return self.usable and batch in self._saved and self._saved[batch][0] > 0

    def forget(self) -> None:
        """Make only whole passes from now on."""
        self.usable = False
        self._saved.clear()
