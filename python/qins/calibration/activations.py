"""Collecting statistics of the inputs of a model's layers, for calibration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..system import page_out

Tensor = torch.Tensor

_LEAST_TOKENS = 256
_LEAST_DIFFERENT = 32
_HELD_TOKENS = 1024
_ROWS = 512  # rows of a matrix of moments that are added at a time


@dataclass
class Layer:
    """A layer to calibrate."""

    module: nn.Module
    codec: str
    group_size: int | None
    transposed: bool = False  # Conv1D: the weight is (in_features, out_features)

    @property
    def parameter(self) -> Tensor:
        """The weight as the module stores it."""
        w: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return w

    @property
    def weight(self) -> Tensor:
        """The weight as (out_features, in_features)."""
        return self.parameter.T if self.transposed else self.parameter


@dataclass
class Text:
    """Calibration data: batches for statistics, and held-out batches."""

    batches: list[Any]
    held: list[Any]

    @property
    def tokens(self) -> tuple[int, int]:
        """Numbers of tokens: for statistics, and held out."""
        return sum(map(_count, self.batches)), sum(map(_count, self.held))


def _ids(batch: Any) -> Iterator[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    yield from (t for t in values if isinstance(t, Tensor))


def _count(batch: Any) -> int:
    t = batch
    if isinstance(batch, Mapping):
        ids = (t for t in _ids(batch) if not t.is_floating_point())  # features of speech are none
        t = batch["input_ids"] if "input_ids" in batch else next(ids, next(_ids(batch)))
    return int(t.shape[:2].numel()) if t.ndim > 1 else int(t.numel())


def cut(token_ids: Tensor, tokens: int, window: int = 512) -> list[Tensor]:
    """Cut the first `tokens` ids into about eight or more batches, each (windows, window); drop the remainder."""
    ids = token_ids.reshape(-1)[:tokens]
    window = max(1, min(window, ids.numel() // 8))
    whole = ids[: ids.numel() // window * window].reshape(-1, window)
    return list(torch.split(whole, max(1, len(whole) // 8)))


def split(batches: Iterable[Any], held_out: float = 0.125) -> Text:
    """Check calibration data and hold out the last part of it.

    Args:
        batches: inputs of the model: tensors of token ids, (batch, length), or mappings of arguments.
        held_out: share of the batches to hold out, 0 to 0.5; at least one unless this is 0.

    Returns:
        the batches for statistics, and the held-out ones.

    Raises:
        ValueError: the text is too short, or too uniform to distinguish inputs.

    """
    listed = [b if isinstance(b, Mapping) else torch.as_tensor(b) for b in batches]
    if not 0.0 <= held_out <= 0.5:
        raise ValueError(f"held_out: expected a share from 0 to 0.5, got {held_out!r}")
    tokens = sum(map(_count, listed)) if listed else 0
    if tokens < _LEAST_TOKENS:
        raise ValueError(f"calibration: expected at least {_LEAST_TOKENS} tokens, got {tokens}")
    ids = [t.reshape(-1) for b in listed for t in _ids(b) if not t.is_floating_point()]
    different = len(set(torch.cat(ids).tolist())) if ids else tokens
    if different < _LEAST_DIFFERENT:
        raise ValueError(
            f"calibration: expected text with at least {_LEAST_DIFFERENT} different tokens, got {different}; "
            "repetitive text says nothing about most inputs"
        )
    if held_out and len(listed) < 2:
        raise ValueError("calibration: expected at least 2 batches, one of them to hold out, got 1")
    held = max(1, round(held_out * len(listed))) if held_out else 0
    return Text(listed[: len(listed) - held], listed[len(listed) - held :])


class _EnoughError(Exception):
    """Raised to end a forward pass once all layers of the round have run."""


class Statistics:
    """Collects second moments of the inputs of as many layers as fit in memory, in the order in which they run.

    Layers that receive the same input tensor share their statistics.

    Args:
        layers: by name.
        room: memory for statistics, in bytes; one layer is accepted even if it needs more.
        mark: called when an accepted layer runs.
        in_order: whether the layers are known to run once each and in a fixed order. The pass can then end at the first
            layer that does not fit.

    """

    def __init__(
        self, layers: Mapping[str, Layer], room: int, mark: Callable[[], None], in_order: bool = False
    ) -> None:
        self.room, self._mark, self._in_order = room, mark, in_order
        self.source: dict[str, str] = {}  # layer to the first layer with the same input
        self._gram: dict[str, Tensor] = {}
        self.held: dict[str, list[Tensor]] = {}
        self.collect_held = False
        self._full = False
        self._learning, self._probing = True, False
        self._seen: Tensor | None = None
        self._calls = self._expected = 0
        self._last: tuple[Any, int, str] = (None, 0, "")
        self._hooks = [
            layer.module.register_forward_pre_hook(lambda _m, args, kwargs, n=name: self._look(n, args, kwargs),
                                                   with_kwargs=True)
            for name, layer in layers.items()
        ]  # fmt: skip

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def probe(self, forward: Callable[[], Any]) -> Tensor | None:
        """Run a pass that adds no statistics; return the last input that it would have added."""
        self._probing = True
        self.run(forward)
        self._probing = False
        return self._seen

    def run(self, forward: Callable[[], Any]) -> None:
        """Run one forward pass; end it early once the remaining layers are irrelevant."""
        self._calls = 0
        self._last = (None, 0, "")
        with suppress(_EnoughError):
            forward()
        if self._learning:
            self._learning, self._expected = False, self._calls

    def _look(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if name not in self.source and not (self._learning and self._accept(name, x)):
            if self._learning and self._in_order:
                raise _EnoughError
            return
        self._calls += 1
        self._mark()
        if self._probing:
            self._seen = x
        elif self.source[name] == name:
            self._add(name, x.detach().reshape(-1, x.shape[-1]))
        if not self._learning and self._calls == self._expected:
            raise _EnoughError

    def _accept(self, name: str, x: Tensor) -> bool:
        last, version, first = self._last
        if x is last and x._version == version:
            self.source[name] = first
            return True
        needed = x.shape[-1] ** 2 * 4
        if self._full or (self._gram and needed > self.room):
            self._full = True
            return False
        self.room -= needed
        self.source[name] = name
        self._gram[name] = torch.zeros(x.shape[-1], x.shape[-1])
        self.held[name] = []
        self._last = (x, x._version, name)
        return True

    def _add(self, name: str, x: Tensor) -> None:
        floats = x.to("cpu", torch.float32)
        if self.collect_held:
            seen = sum(len(h) for h in self.held[name])
            if seen < _HELD_TOKENS:
                self.held[name].append(floats[: _HELD_TOKENS - seen].clone())
        else:
            # its lower triangle, in parts that Ctrl-C need not wait for
            for begin, end in _blocks(floats.shape[-1]):
                self._gram[name][begin:end, :end].addmm_(floats[:, begin:end].T, floats[:, :end])

    def take_gram(self, name: str) -> Tensor:
        """Return the sum of x x^T over the inputs x of a layer, and forget it."""
        gram = self._gram.pop(name)
        for begin, end in _blocks(len(gram)):
            gram[:begin, begin:end] = gram[begin:end, :begin].T
        return gram


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size, _ROWS):
        yield begin, min(begin + _ROWS, size)


def forward_call(model: nn.Module, batch: Any, *, every_logit: bool = False) -> Callable[[], Any]:
    """Return a minimal call of the model: no cache, and logits of the last token only unless `every_logit`."""
    parameters = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "use_cache" in parameters:
        extra["use_cache"] = False
    if "logits_to_keep" in parameters and not every_logit:
        extra["logits_to_keep"] = 1
    if isinstance(batch, Mapping):
        return lambda: model(**(extra | dict(batch)))
    return lambda: model(batch, **extra)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, without gradients, within the block."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def paged_out(layers: Iterable[Layer], mapped: bool) -> Iterator[None]:
    """Within the block, release each layer's weight after its use, if a mapped file can bring it back."""
    hooks = []
    if mapped:
        for layer in layers:
            hooks.append(layer.module.register_forward_hook(lambda m, _x, _y: page_out(m.weight.data)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
