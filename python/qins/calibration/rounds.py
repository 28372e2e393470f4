"""Passes of the model over the text, as many as the memory for statistics requires."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..codec import ErrorFeedback
from .activations import Layer, Statistics, Text, evaluating, forward_call, paged_out
from .blocks import BlockChain

Tensor = torch.Tensor


@dataclass
class Clock:
    """Seconds spent on each kind of work."""

    statistics: float = 0.0
    rounding: float = 0.0


def rounds(
    model: nn.Module,
    layers: Mapping[str, Layer],
    text: Text,
    damping: float,
    room: int,
    mapped: bool,
    clock: Clock,
    sequential: bool = False,
    feedback_of: Callable[[Any, float], Any] = ErrorFeedback,
) -> Iterator[tuple[str, Any, Tensor | None]]:
    """Yield each layer's name, the ErrorFeedback of its inputs, and its held-out inputs, (tokens, in_features).

    The model runs over the text as often as the memory for statistics requires. Finished blocks are skipped where that
    makes no difference (see `BlockChain`). A layer that the text does not reach has neither feedback nor inputs.
    `feedback_of` may return something else than an ErrorFeedback, to be made one elsewhere.
    """
    left = dict(layers)
    chain = BlockChain(model, [layer.module for layer in layers.values()], first=sequential)
    batches = [*text.batches, *text.held]
    checked = False
    while left:
        begin = time.perf_counter()
        statistics = Statistics(left, room, chain.mark, in_order=checked and chain.usable)
        try:
            with evaluating(model), paged_out(layers.values(), mapped), chain.watched():
                for i, batch in enumerate(batches):
                    statistics.collect_held = i >= len(text.batches)
                    forward = forward_call(model, batch)
                    statistics.run(partial(chain.run, i, forward, whole=not checked))
                    if i == 0 and not checked and chain.skips(len(batches) - 1):
                        checked = True
                        _check_chain(chain, statistics, forward_call(model, batches[-1]), len(batches) - 1)
        finally:
            statistics.remove()
        clock.statistics += time.perf_counter() - begin
        for source in list(dict.fromkeys(statistics.source.values())):
            try:
                feedback = feedback_of(statistics.take_gram(source).numpy(), damping)
            except ValueError as e:
                raise ValueError(f"{source}: {e}") from None
            held = statistics.held.pop(source)
            for name in [n for n in left if statistics.source.get(n) == source]:
                del left[name]
                yield name, feedback, torch.cat(held) if held else None
        if not statistics.source:  # none of the remaining layers ever runs
            for name in left:
                yield name, None, None
            return


def _check_chain(chain: BlockChain, statistics: Statistics, forward: Callable[[], Any], batch: int) -> None:
    """Disable resuming unless a resumed pass gives the layers the same inputs as a whole pass."""
    whole, part = (
        statistics.probe(partial(chain.run, batch, forward, whole=whole, keep=False)) for whole in (True, False)
    )
    if whole is None or part is None or not torch.equal(whole, part):
        chain.forget()
