"""Side-by-side timing, for `qins bench` and the scripts in benchmarks/."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .. import _core
from ..codec import isas
from ..system import cpu_name, get_num_threads

Contestants = dict[str, Callable[[int], object]]


def last_level_cache_bytes() -> int:
    """Return the size of the largest cache that CPU 0 reports, but at least 32 MiB."""
    best = 32 << 20
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        best = max(best, int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return best


def rotation_bytes() -> int:
    """Return the size of the set of weights to rotate through, so that the next weights are never in cache.

    It is at least 256 MB: twice a 32 MB cache is only two layers, and random replacement keeps part of them cached.
    """
    return max(2 * last_level_cache_bytes(), 256 << 20)


def machine() -> dict[str, object]:
    """Describe the CPU, and the instruction sets and threads in use, for the heading of a table."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "last_level_cache_mib": last_level_cache_bytes() >> 20,
        "isas": isas(),
        "threads": get_num_threads(),
    }


def race(contestants: Contestants, seconds: float = 1.0, rounds: int = 3) -> dict[str, float]:
    """Return the best time in seconds of each contestant; they are called in turn with 0, 1, 2, ... for `seconds` each.

    Taking turns spreads the noise of a shared machine evenly. The best of many runs is what the machine can do.
    """
    best = dict.fromkeys(contestants, float("inf"))
    spent = dict.fromkeys(contestants, 0.0)
    n = 0
    while any(spent[c] < seconds or n < rounds for c in contestants):
        for name, run in contestants.items():
            if spent[name] >= seconds and n >= rounds:
                continue
            begin = time.perf_counter()
            run(n)
            took = time.perf_counter() - begin
            spent[name] += took
            best[name] = min(best[name], took)
        n += 1
    return best


_MOST_COPIES = 1024  # of one weight: those of a few kilobytes would take minutes to make


def _contestants(
    shape: tuple[int, int], rotation: int, group_size: int | str | None
) -> dict[str, Callable[[Any], Callable[[int], object]]]:
    """Return a factory per contestant, from activations to a callable; weights rotate through `rotation` bytes."""
    import torch
    from torch import nn

    from ..nn import QINSLinear

    linear = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)

    def copies(size: int) -> range:
        return range(min(max(2, rotation // size), _MOST_COPIES))

    layers = [QINSLinear.from_linear(linear, group_size=group_size)]
    for _ in copies(shape[0] * shape[1])[1:]:
        twin = QINSLinear(shape[1], shape[0], False, group_size=group_size, device="meta").to_empty(device="cpu")
        twin.load_state_dict(layers[0].state_dict())
        layers.append(twin)
    floats = [linear.weight.clone() for _ in copies(linear.weight.nbytes)]
    halves = [linear.weight.bfloat16() for _ in copies(linear.weight.nbytes // 2)]
    codes = [layer.get_buffer("codes").numpy() for layer in layers]

    def in_turn(run: Callable[[Any, Any], object], weights: list[Any], x: Any) -> Callable[[int], object]:
        return lambda i: run(x, weights[i % len(weights)])

    def multiply(x: Any, layer: Any) -> object:
        return layer(x)

    product = torch.nn.functional.linear
    return {
        "plain read of the codes": lambda x: in_turn(lambda _, c: _core.read(c, get_num_threads()), codes, x),
        "torch float32": lambda x: in_turn(product, floats, x),
        "torch bfloat16": lambda x: in_turn(product, halves, x.bfloat16()),
        "log8, float32 in": lambda x: in_turn(multiply, layers, x),
        "log8, bfloat16 in": lambda x: in_turn(multiply, layers, x.bfloat16()),
    }


def run(
    shape: tuple[int, int], rows: Iterable[int], seconds: float, group_size: int | str | None = "default"
) -> dict[str, Any]:
    """Time x @ W.T for one layer of shape (out_features, in_features), for each number of rows of x.

    Returns:
        the machine, the shape, the group size, and milliseconds by number of rows and contestant.

    """
    import torch

    from ..codec import resolve_group_size

    makers = _contestants(shape, min(rotation_bytes(), 1 << 30), group_size)
    milliseconds: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        for n in rows:
            x = torch.randn(n, shape[1])
            times = race({name: make(x) for name, make in makers.items()}, seconds)
            milliseconds[n] = {name: t * 1e3 for name, t in times.items()}
    size = resolve_group_size("log8", group_size, shape[1])
    return {"machine": machine(), "shape": list(shape), "group_size": size, "milliseconds": milliseconds}
