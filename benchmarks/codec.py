"""Speed of encoding and decoding: every codec on every instruction set, the prototype's PyTorch code, a plain copy.

python benchmarks/codec.py [--json FILE] [--seconds S]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

import qins
from qins.cli.bench import machine, race

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from seed_golden import seed_decode, seed_encode

SHAPES = {"L1": (4, 1024), "L2": (128, 2048), "memory": (8192, 3072)}
CODECS = [
    ("golden", None), ("log9", None), ("log8", None), ("log8", 128), ("log8", 64),
    ("log6", 32), ("log5", 32), ("log4", 32),
]  # fmt: skip


def measure(shape: tuple[int, int], seconds: float) -> list[dict[str, object]]:
    w = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    tensor = torch.from_numpy(w)
    out, copied = np.empty_like(w), torch.empty_like(tensor)
    seeds = seed_encode(tensor)
    encoders = {("seed, torch", ""): lambda i: seed_encode(tensor)}
    decoders = {("seed, torch", ""): lambda i: seed_decode(*seeds), ("copy", ""): lambda i: copied.copy_(tensor)}
    for isa in qins.isas():
        for codec, group in CODECS:
            e = qins.encode(w, codec, group_size=group)

            def encode(i, isa=isa, codec=codec, group=group):
                with qins.use_isa(isa):
                    qins.encode(w, codec, group_size=group)

            def decode(i, isa=isa, e=e):
                with qins.use_isa(isa):
                    e.decode(out=out)

            name = f"{codec}/{group}" if group else codec
            encoders[name, isa] = encode
            decoders[name, isa] = decode
    rows = []
    for what, contestants in (("encode", encoders), ("decode", decoders)):
        for (name, isa), t in race(contestants, seconds).items():
            rows.append(
                {"what": what, "codec": name, "isa": isa, "weights_per_s": w.size / t, "GB_per_s": w.nbytes / t / 1e9}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per row of the table")
    arguments = parser.parse_args()
    result = {"machine": machine(), "sizes": {}}
    print(result["machine"])
    for size, shape in SHAPES.items():
        rows = measure(shape, arguments.seconds)
        result["sizes"][size] = rows
        base = {r["what"]: r["weights_per_s"] for r in rows if r["codec"] == "seed, torch"}
        copy = next(r["weights_per_s"] for r in rows if r["codec"] == "copy")
        print(f"\n{size}: {shape[0]}x{shape[1]} float32")
        print(f"{'':8}{'codec':14}{'isa':9}{'M weights/s':>12}{'float GB/s':>12}{'to seed':>9}{'to copy':>9}")
        for r in rows:
            speed = r["weights_per_s"]
            print(
                f"{r['what']:8}{r['codec']:14}{r['isa']:9}{speed / 1e6:12.0f}{r['GB_per_s']:12.2f}"
                f"{speed / base[r['what']]:9.1f}{speed / copy:9.2f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
