"""Bits and speed of restoring bfloat16 weights bit for bit, beside lossless formats that only restore.

    python benchmarks/exact.py [--codec log8] [--group-size 64] [--repeat 5] [--json FILE]

Weights are those of all-MiniLM-L6-v2 and Whisper tiny.en, cast to bfloat16, and normal ones in the shapes of
SmolLM2-135M. ZipNN is its package; of DFloat11, whose package decodes on GPUs, the size is computed: a sign, a mantissa
and a Huffman code of the exponent. Speeds are of one thread, the best of all repetitions, in CPU time.
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaged_models import minilm, whisper

import qins
from qins.cli.bench import machine
from qins.codec import residual, restore
from qins.files import open_checkpoint

SMOLLM2 = {"q_proj": (576, 576), "k_proj": (192, 576), "gate_proj": (1536, 576), "down_proj": (576, 1536)}


def of_checkpoint(path: Path) -> Iterator[torch.Tensor]:
    """Yield the matrices of linear layers."""
    checkpoint = open_checkpoint(path)
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2 and "embed" not in name:
            yield checkpoint.load(name).bfloat16()


def normal() -> Iterator[torch.Tensor]:
    """Yield normal weights in SmolLM2's shapes."""
    generator = torch.Generator().manual_seed(0)
    for shape in SMOLLM2.values():
        yield (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def huffman_bits(weights: torch.Tensor) -> float:
    """Return the mean bits of a sign, a mantissa and a Huffman code of the exponent."""
    exponents = (weights.view(torch.int16).numpy().reshape(-1) >> 7) & 0xFF
    heap = [(n, i, 0) for i, n in enumerate(Counter(exponents.tolist()).values())]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        (a, i, _), (b, _, _) = heapq.heappop(heap), heapq.heappop(heap)
        total += a + b
        heapq.heappush(heap, (a + b, i, 0))
    return 8 + total / exponents.size


def timed(repeat: int, call: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return the result of a call and its least CPU time."""
    best, result = float("inf"), None
    for _ in range(repeat):
        began = time.process_time()
        result = call(*args)
        best = min(best, time.process_time() - began)
    return result, best


def zipnn(data: bytes) -> Any:
    """Compress with ZipNN, which overwrites its argument."""
    return ZipNN(bytearray_dtype="bfloat16", threads=1).compress(bytearray(data))


def measure(tensors: list[torch.Tensor], codec: str, group_size: int | None, repeat: int) -> dict[str, float]:
    """Return bits per weight and speeds in M weights/s."""
    count = run = exact = encoding = decoding = dfloat = zipped = zipping = unzipping = 0.0
    for w in tensors:
        codes = qins.encode(w, codec, group_size=group_size)
        stream, seconds = timed(repeat, residual, w, codes)
        encoding += seconds
        restored, seconds = timed(repeat, restore, codes, stream, "bfloat16")
        decoding += seconds
        assert np.array_equal(restored, w.view(torch.int16).numpy().view(np.uint16))
        count += w.numel()
        run += 8 * codes.nbytes
        exact += 8 * len(stream)
        dfloat += w.numel() * huffman_bits(w)
        if ZipNN is not None:
            data = w.view(torch.int16).numpy().tobytes()
            packed, seconds = timed(repeat, zipnn, data)
            zipping += seconds
            again, seconds = timed(repeat, ZipNN(bytearray_dtype="bfloat16", threads=1).decompress, packed)
            unzipping += seconds
            assert bytes(again) == data
            zipped += 8 * len(packed)
    figures = {
        "codes": run / count, "residuals": exact / count, "total": (run + exact) / count, "DFloat11": dfloat / count,
        "encode M/s": 1e-6 * count / encoding, "restore M/s": 1e-6 * count / decoding,
    }  # fmt: skip
    if ZipNN is not None:
        figures |= {"ZipNN": zipped / count, "ZipNN compress M/s": 1e-6 * count / zipping}
        figures["ZipNN decompress M/s"] = 1e-6 * count / unzipping
    return figures


try:
    from zipnn import ZipNN
except ImportError:
    ZipNN = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="log8")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    qins.set_num_threads(1)
    if ZipNN is None:
        print("NOT RUN: ZipNN is not installed")
    found = {}
    sources = {
        "all-MiniLM-L6-v2": [*of_checkpoint(minilm())], "Whisper tiny.en": [*of_checkpoint(whisper())],
        "normal, SmolLM2's shapes": [*normal()],
    }  # fmt: skip
    for name, tensors in sources.items():
        found[name] = measure(tensors, options.codec, options.group_size or None, options.repeat)
        print(name + ": " + ", ".join(f"{k} {v:.2f}" if v < 100 else f"{k} {v:.0f}" for k, v in found[name].items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "figures": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
