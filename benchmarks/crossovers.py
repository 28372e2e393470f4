"""The number of rows of activations from which each kernel is the fastest, for the table in qins_ext/ways.c.

    python benchmarks/crossovers.py [--shape 4096x3072] [--rows 1 2 3 ...] [--isas ...] [--seconds 0.2] [--json FILE]

Forces every kernel (way) that supports a format in turn, in one process, over weights that rotate through more memory
than the last-level cache. Prints for each number of rows: milliseconds of every kernel, the fastest, and the choice of
the table, marked where it is more than 5 % slower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qins
from qins import _core
from qins.cli.bench import machine, race, rotation_bytes

FORMATS = [("log8", None), ("log8", 128), ("log8", 64), ("log8", 32), ("log8", 48), ("log9", None), ("golden", None)]
NEAR = 1.05  # slower by less than this is noise


def layers_of(weight: torch.Tensor, codec: str, group_size: int | None) -> list[qins.QINSLinear]:
    """Return enough copies of a quantized layer to exceed the last-level cache."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    first = qins.QINSLinear.from_linear(linear, codec, group_size=group_size)
    layers = [first]
    size = sum(b.nbytes for b in first.buffers())
    while len(layers) * size < rotation_bytes():
        twin = qins.QINSLinear(*weight.shape[::-1], False, codec=codec, group_size=group_size, device="meta")
        twin.to_empty(device="cpu").load_state_dict(first.state_dict())
        layers.append(twin)
    return layers


def ways_of(layer: qins.QINSLinear, rows: int, dtype: str) -> tuple[str, list[str]]:
    """Return the kernel that the table chooses, and all that support the format."""
    mu = float(layer.get_buffer("mu")) if layer.codec == "log8" else 0.0
    found = []
    for way in _core.WAYS:
        _core.force_way(way)
        if _core.way(layer.codec, mu, layer.group_size or 0, rows, dtype) == way:
            found.append(way)
    _core.force_way(None)
    return _core.way(layer.codec, mu, layer.group_size or 0, rows, dtype), found


def race_ways(layers: list[qins.QINSLinear], x: torch.Tensor, ways: list[str], seconds: float) -> dict[str, float]:
    """Return the best milliseconds of each kernel."""

    def run(way: str, part: float) -> Callable[[int], object]:
        def call(i: int) -> object:
            _core.force_way(way)
            return layers[(i + int(part * len(layers))) % len(layers)](x)

        return call

    try:
        with torch.inference_mode():
            times = race({way: run(way, j / len(ways)) for j, way in enumerate(ways)}, seconds)
    finally:
        _core.force_way(None)
    return {way: t * 1e3 for way, t in times.items()}


def layer_options(description: str | None, shape: str, rows: list[int]) -> argparse.ArgumentParser:
    """Return the options of a benchmark of one layer."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=shape, help="out_features x in_features")
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument("--isas", nargs="+", default=[qins.isas()[0]])
    parser.add_argument("--seconds", type=float, default=0.2, help="seconds per figure")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    parser = layer_options(__doc__, "4096x3072", [1, 2, 3, 4, 8, 9, 16, 24, 32, 48, 64, 128, 192, 512])
    arguments = parser.parse_args()
    print(machine())
    out_features, in_features = map(int, arguments.shape.split("x"))
    weight = torch.randn(out_features, in_features) * 0.02
    results: list[dict[str, Any]] = []
    for codec, group_size in FORMATS:
        layers = layers_of(weight, codec, group_size)
        for isa in arguments.isas:
            for dtype in (torch.float32, torch.bfloat16):
                name = str(dtype)[6:]
                print(f"\n{codec}{f'/{group_size}' if group_size else ''}, {name}, {isa}, {arguments.shape}")
                for rows in arguments.rows:
                    with qins.use_isa(isa):
                        taken, ways = ways_of(layers[0], rows, name)
                        times = race_ways(layers, torch.randn(rows, in_features).to(dtype), ways, arguments.seconds)
                    fastest = min(times, key=times.__getitem__)
                    slow = times[taken] > NEAR * times[fastest]
                    each = "  ".join(f"{way} {t:.3f}" for way, t in sorted(times.items(), key=lambda p: p[1]))
                    mark = f"  <- the table chooses {taken}" if slow else ""
                    print(f"{rows:5}  {each}{mark}")
                    row = {"codec": codec, "group_size": group_size, "isa": isa, "dtype": name, "rows": rows}
                    results.append({**row, "taken": taken, "milliseconds": times})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "shape": arguments.shape, "results": results}))


if __name__ == "__main__":
    main()
