"""The price of smaller groups: products with log8 in groups of 64 and 32, as multiples of the time with groups of 128.

    python benchmarks/groups.py [--shape 8192x3072] [--rows 1 2 4 ...] [--groups 128 64 32] [--isas ...] [--json FILE]

All group sizes take turns in one process, each over weights that rotate through more memory than the last-level cache.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from crossovers import layer_options, layers_of

import qins
from qins import _core
from qins.cli.bench import machine, race

DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = layer_options(__doc__, "8192x3072", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 512])
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 64, 32], help="the first is the unit")
    arguments = parser.parse_args()
    print(machine())
    out_features, in_features = map(int, arguments.shape.split("x"))
    weight = torch.randn(out_features, in_features) * 0.02
    # in both orders, because pages that come later can be faster or slower
    layers: dict[int, list[qins.QINSLinear]] = {size: [] for size in arguments.groups}
    for size in [*arguments.groups, *reversed(arguments.groups)]:
        layers[size] += layers_of(weight, "log8", size)
    results: list[dict[str, Any]] = []
    for isa in arguments.isas:
        for dtype in DTYPES:
            name = str(dtype)[6:]
            print(
                f"\n{name}, {isa}, {arguments.shape}: ms with groups of {arguments.groups[0]}, then the others' ratios"
            )
            for rows in arguments.rows:
                x = torch.randn(rows, in_features).to(dtype)
                turns = {str(size): (lambda i, some=some, x=x: some[i % len(some)](x)) for size, some in layers.items()}
                with torch.inference_mode(), qins.use_isa(isa):
                    times = race(turns, arguments.seconds)
                    ways = {
                        str(size): _core.way("log8", float(some[0].get_buffer("mu")), size, rows, name)
                        for size, some in layers.items()
                    }
                unit = times[str(arguments.groups[0])]
                others = "  ".join(f"{size} {t / unit:.3f} {ways[size]}" for size, t in list(times.items())[1:])
                print(f"{rows:5}  {unit * 1e3:7.3f} {ways[str(arguments.groups[0])]}  {others}", flush=True)
                row = {"isa": isa, "dtype": name, "rows": rows, "ways": ways}
                results.append({**row, "milliseconds": {size: t * 1e3 for size, t in times.items()}})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "shape": arguments.shape, "results": results}))


if __name__ == "__main__":
    main()
