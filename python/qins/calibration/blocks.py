"""Running only the blocks of a model that a pass is about, from hidden states that the pass before left.

A round of calibration looks at a few layers. With hidden states kept where the round before ended, the blocks in front
need not run again. That is right only if a block gets nothing but its predecessor's output from it; whether that is
so is checked, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


def _blocks(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """The ModuleList whose blocks hold the most of these layers, if all others hold none."""
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
    """The blocks of a model, one after the other, and the hidden states that a batch had on its way.

    Args:
        model: any model.
        layers: those that rounds are about.
        first: whether a batch's next pass begins with the block of the first layer that the last one looked at, as it
            must if these layers change in between; otherwise with that of the last.

    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module], first: bool) -> None:
        self.blocks = _blocks(model, list(layers))
        self.usable = len(self.blocks) > 1
        self.first = first
        self._saved: dict[int, tuple[int, Tensor]] = {}
        self._tuples: dict[int, int] = {}  # block: length of the tuple that it returns
        self._current: tuple[int, Tensor] | None = None
        self._marked: tuple[int, Tensor] | None = None
        self._out: Any = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follow the hidden states meanwhile."""
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
        """Say that a layer that the round is about is running."""
        if self._marked is None or not self.first:
            self._marked = self._current

    def run(self, batch: int, forward: Callable[[], Any], *, whole: bool = False, keep: bool = True) -> None:
        """Make a pass with a batch, from where its last one allows or a whole one; `keep` lets the next begin later."""
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
        """Whether the batch's next pass would leave blocks out."""
        return self.usable and batch in self._saved and self._saved[batch][0] > 0

    def forget(self) -> None:
        """Make whole passes from now on."""
        self.usable = False
        self._saved.clear()
