"""Decoder layers that run ahead of their turn: those of one token in one call of the core.

transformers calls a model's layers one after another. What Python does between their products takes as long as half of
a small model's, most of it waiting for memory: each layer's codes push Python's data out of the processor's caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import _core
from ..codec import DTYPE_NUMBER
from ..system import get_num_threads
from .layer_description import are_of_versions
from .masks import mask_for
from .rotation import NO_ROTATION, rotation_for

if TYPE_CHECKING:
    from .decoding import LayerStep

Tensor = torch.Tensor

_KEY = "_qins_ahead"  # in the dictionary of the call's cache


class Chain:
    """Layers each of which gets the result of the one before it, and otherwise the same arguments.

    Attributes:
        steps: their steps, with the leading one first.
        cores, rotates: for each, the core's description, and whether it rotates queries and keys.
        halves: as in LayerDescription, of all.

    """

    def __init__(self, steps: list[LayerStep]) -> None:
        self.steps = steps
        self.cores = [step.description.core for step in steps]
        self.rotates = [step.description.rotates for step in steps]
        self.halves = steps[0].description.halves
        watched: list[tuple[dict[str, Any], str, Any]] = []
        for step in steps[1:]:
            layer = vars(step.layer)
            watched += [(vars(step), "about", step.about), (vars(step), "leads", False)]
            watched += [(layer, step.key, step), (layer, "training", False), *step.description.watched]
        followers = [step.description for step in steps[1:]]
        self._watched = tuple(watched)
        self._versions = [v for about in followers for v in about.versions]
        self._hooks = tuple(h for about in followers for h in about.hooks)

    def holds(self) -> bool:
        """Return whether all that follow the leading layer are as they were, and not observed."""
        return _core.are_unchanged(self._watched, self._hooks) and are_of_versions(self._versions)

    def covers(self, layers: list[Any]) -> bool:
        """Return whether these are all that can run ahead, of the layers that write to these layers of a cache."""
        n = len(self.steps)
        if n >= len(layers):
            return n == len(layers)
        step = _left_by(layers[n])
        return step is None or not step.may_follow(self.steps[0], n)


class Ahead:
    """What the layers after a leading one will return when their turn comes.

    Until its turn, nothing that a layer did can be seen: its new keys and values are in spare memory of the cache. It
    takes its turn only if it is called with the result of the layer before it, unchanged, and with the leading layer's
    other arguments, on a cache that nobody else has written to. Otherwise it computes as if nothing had run.
    """

    def __init__(self, steps: list[LayerStep], results: tuple[Tensor, ...], cache: Any, given: dict[str, Any]) -> None:
        self._steps, self._results, self._version = steps, results, results[0]._version
        self._others = {n: v for n, v in given.items() if v is not cache}
        self._turn = 1

    def __reduce__(self) -> Any:
        return type(None), ()  # copies of a cache have nothing ahead

    def take(self, step: LayerStep, cache: Any, x: Tensor, given: dict[str, Any]) -> Tensor | None:
        """Return a layer's result, or None if it is not called as expected, which ends what was ahead."""
        turn, others = self._turn, self._others
        if step is self._steps[turn]:
            alike = x is self._results[turn - 1] and x._version == self._version and len(given) == len(others) + 1
            if alike and all(v is cache or v is others.get(n, cache) for n, v in given.items()):
                kept = cache.layers[step.description.index]
                room: Any = getattr(kept, "_qins_room", None)
                mask = given.get("attention_mask")
                place = None if room is None else room.ahead(kept, step, x, mask)
                if place is not None:
                    self._turn += 1
                    if self._turn == len(self._steps):
                        del cache.__dict__[_KEY]
                    room.leave(kept, step, x, mask, place[3])
                    return self._results[turn]
            step.leads = True
        del cache.__dict__[_KEY]
        return None


def take(step: LayerStep, cache: Any, x: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Return what a layer has computed ahead of this call, or None."""
    ahead: Ahead | None = cache.__dict__.get(_KEY)
    return None if ahead is None else ahead.take(step, cache, x, given)


def run_ahead(leading: LayerStep, cache: Any, x: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Run a layer and all that will follow it as they did for the last token; return the layer's result.

    Returns None, and nothing has happened, if no layer follows or a quantized cache cannot hold their states.
    """
    layers, shape, dtype = cache.layers[leading.description.index :], x.shape, x.dtype
    mask: Tensor | None = given.get("attention_mask")
    chain = leading.chain
    if chain is None or not chain.holds() or not chain.covers(layers):
        chain = leading.chain = _chain(leading, layers)
    (cos, sin, rotary_dim, rotary_next), _in_use = NO_ROTATION
    if any(chain.rotates):
        rotation = given.get("position_embeddings")
        if type(rotation) is not tuple:
            return None
        (cos, sin, rotary_dim, rotary_next), _in_use = rotation_for(rotation, dtype, chain.halves)
    places = []
    for kept, step, core, rotates in zip(layers, chain.steps, chain.cores, chain.rotates, strict=False):
        room = getattr(kept, "_qins_room", None)
        place = None if room is None else room.ahead(kept, step, x, mask)
        if place is None:
            break
        places.append((core, *place, rotary_dim if rotates else 0))
    if len(places) < 2:
        return None
    x = x.contiguous()
    with torch.inference_mode(False):  # for tensors that count changes of their values
        states = torch.empty((len(places), *shape), dtype=dtype)
    ran = _core.decode_layers(
        places, DTYPE_NUMBER[dtype], x.data_ptr(), states.data_ptr(), x.numel() * x.element_size(), shape[0],
        cos, sin, rotary_next, *mask_for(mask)[:3], get_num_threads(),
    )  # fmt: skip
    if ran < 2:
        return None
    results = states.unbind()
    cache.__dict__[_KEY] = Ahead(chain.steps[:ran], results, cache, given)
    layers[0]._qins_room.leave(layers[0], leading, x, mask, places[0][4])
    return results[0]


def _left_by(kept: Any) -> LayerStep | None:
    """Return the step that last wrote to a layer of a cache."""
    room = getattr(kept, "_qins_room", None)
    return None if room is None else room.left_by


def _chain(leading: LayerStep, layers: list[Any]) -> Chain:
    """Return the chain of layers that last wrote to these layers of a cache."""
    steps = [leading]
    while len(steps) < len(layers):
        step = _left_by(layers[len(steps)])
        if step is None or not step.may_follow(leading, len(steps)):
            break
        steps.append(step)
    return Chain(steps)
