"""Choosing codes: error feedback where it does better than the nearest codes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ..codec import DAMPING, LOG_BITS, EncodedArray, ErrorFeedback, encode
from ..system import page_out
from .activations import Layer, Text
from .rounds import Clock, rounds
from .store import Choice, Store

Tensor = torch.Tensor
Found = tuple[str, Any, Tensor | None]  # what `rounds` yields

_WAITING = 64  # layers whose codes are chosen elsewhere at a time: their moments and weights are in memory


def output_errors(x: Tensor, weight: Tensor, e: EncodedArray | None) -> Tensor:
    """Return the mean squared error of each output over tokens x, float64 (N,).

    Without codes it is the mean square of the outputs themselves, as if the codes were zeros.
    """
    errors = torch.empty(weight.shape[0], dtype=torch.float64)
    rows = max(1, (1 << 22) // max(weight.shape[1], 1))
    decoded = torch.zeros(min(rows, weight.shape[0]), weight.shape[1])
    for row in range(0, weight.shape[0], rows):
        w = weight[row : row + rows].float()
        part = decoded[: len(w)]
        if e is not None:
            e.decode_block(part.numpy(), "float32", row, 0)
        errors[row : row + rows] = (x @ (part - w).T).square().mean(0, dtype=torch.float64)
    return errors


@dataclass(frozen=True)
class Moments:
    """Arguments of ErrorFeedback, which is made where the codes are chosen."""

    gram: Any
    damping: float


class Rounding(Protocol):
    """Chooses the codes of layers elsewhere, several at a time."""

    def submit(self, name: str, arguments: tuple[Any, ...]) -> Callable[[], Choice]:
        """Start `choose_layer(*arguments)`; return a function that waits for its result."""


def choose_layer(
    weight: Tensor, codec: str, group_size: int | None, feedback: ErrorFeedback | Moments | None, held: Tensor | None
) -> Choice:
    """Choose the codes of one layer: those of error feedback if they are better than the nearest ones.

    Args:
        weight: (out_features, in_features).
        codec: one of LOG_BITS.
        group_size: as in `encode`.
        feedback: of the layer's inputs; None if the text does not reach it.
        held: (tokens, in_features), inputs on which the two are compared.

    Raises:
        ValueError: the weights or the moments are not usable.

    """
    if feedback is None:
        nearest = encode(weight, codec, group_size=group_size)
        return Choice(nearest, kept="nearest: the calibration text does not reach this layer")
    if isinstance(feedback, Moments):
        feedback = ErrorFeedback(feedback.gram, feedback.damping)
    calibrated = feedback.encode(weight, codec, group_size=group_size)
    if held is None or not len(held):
        return Choice(calibrated)
    nearest = encode(weight, codec, group_size=group_size)
    size, before, after = (float(output_errors(held, weight, e).sum()) for e in (None, nearest, calibrated))
    if size > 0.0:
        before, after = before / size, after / size
    if after < before:
        return Choice(calibrated, before, after)
    return Choice(nearest, before, before, "nearest: error feedback is no better on held-out tokens")


def choose_codes(
    model: nn.Module,
    layers: Mapping[str, Layer],
    text: Text,
    *,
    damping: float = DAMPING,
    room: int = 128 << 20,
    mapped: bool = False,
    store: Store | None = None,
    advance: Callable[[int], None] = lambda _: None,
    clock: Clock | None = None,
    install: Callable[[str, Choice], None] | None = None,
    sequential: bool = False,
    rounding: Rounding | None = None,
) -> Iterator[tuple[str, Choice]]:
    """Yield each layer's name and codes.

    Args:
        model: a float model.
        layers: the layers to encode, by name.
        text: result of `split`.
        damping: as in `ErrorFeedback`.
        room: memory for statistics at a time, in bytes; one layer is accepted even if it needs more.
        mapped: whether weights are in mapped files and may be released after use.
        store: where finished layers are saved, and loaded from.
        advance: called with the number of weights of each finished layer.
        clock: adds up the time.
        install: called with each layer's codes as soon as they are chosen.
        sequential: whether install changes the model before the next round.
        rounding: what chooses the codes, while the model runs over the text for later layers; None: this process.

    Raises:
        ValueError: a layer's weights or statistics are not usable; the message names the layer.

    """
    clock = clock or Clock()
    begin, before = time.perf_counter(), clock.statistics
    left = dict(layers)

    def finish(name: str, choice: Choice) -> tuple[str, Choice]:
        if install:
            install(name, choice)
        advance(layers[name].weight.numel())
        return name, choice

    for name, layer in layers.items():
        done = store.get(name) if store else None
        if done is None and layer.codec not in LOG_BITS:
            done = Choice(encode(layer.weight, layer.codec), kept=f"{layer.codec} has one code per value")
            if store:
                store.put(name, done)
        if done is not None:
            del left[name]
            yield finish(name, done)
    chosen = _chosen_here if rounding is None else partial(_chosen_elsewhere, rounding)
    feedback_of = ErrorFeedback if rounding is None else Moments
    for name, choice in chosen(
        layers, rounds(model, left, text, damping, room, mapped, clock, sequential, feedback_of)
    ):
        if store:
            store.put(name, choice)
        yield finish(name, choice)
        if mapped:
            page_out(layers[name].parameter)
    clock.rounding += time.perf_counter() - begin - (clock.statistics - before)


def _arguments(layer: Layer, feedback: Any, held: Tensor | None) -> tuple[Any, ...]:
    return layer.weight, layer.codec, layer.group_size, feedback, held


def _named(name: str, result: Callable[[], Choice]) -> tuple[str, Choice]:
    try:
        return name, result()
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


def _chosen_here(layers: Mapping[str, Layer], found: Iterator[Found]) -> Iterator[tuple[str, Choice]]:
    for name, feedback, held in found:
        yield _named(name, partial(choose_layer, *_arguments(layers[name], feedback, held)))


def _chosen_elsewhere(
    rounding: Rounding, layers: Mapping[str, Layer], found: Iterator[Found]
) -> Iterator[tuple[str, Choice]]:
    waiting: deque[tuple[str, Callable[[], Choice]]] = deque()
    for name, feedback, held in found:
        waiting.append((name, rounding.submit(name, _arguments(layers[name], feedback, held))))
        while len(waiting) > _WAITING:
            yield _named(*waiting.popleft())
    for first in waiting:
        yield _named(*first)
