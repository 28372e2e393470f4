"""x @ W.T for a few rows of x: QINSLinear beside every peer that is installed, and beside a plain read of the codes.

    python benchmarks/linear.py [--rows 1 2 4 8 ...] [--shape 8192x3072] [--seconds S] [--json FILE]

Weights rotate through more memory than the last-level cache (at most 2 GiB), all contestants take turns in one process,
and the best of many repetitions counts. Compare columns of one run, not figures of two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from peers import last_level_cache_bytes, machine, race
from torch import nn
from torch.nn import functional

import qins
from qins import _core

FORMATS = [("log8", None), ("log8", 128), ("log8", 64), ("log8", 32), ("log9", None), ("golden", None)]
ROTATION_LIMIT = 2 << 30


def copies(tensors: list[torch.Tensor]) -> int:
    size = sum(t.numel() * t.element_size() for t in tensors)
    return max(2, min(2 * last_level_cache_bytes(), ROTATION_LIMIT) // size)


def float_peer(weight: torch.Tensor, x: torch.Tensor) -> Callable[[int], object]:
    weights = [weight.to(x.dtype, copy=True) for _ in range(copies([weight.to(x.dtype)]))]
    return lambda i: functional.linear(x, weights[i % len(weights)])


def int8pack_peer(weight: torch.Tensor, x: torch.Tensor) -> Callable[[int], object]:
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    all_codes = [codes.clone() for _ in range(copies([codes]))]
    scale = scale.bfloat16()
    return lambda i: torch._weight_int8pack_mm(x, all_codes[i % len(all_codes)], scale)


def module_peer(
    make: Callable[[nn.Linear], nn.Module], weight: torch.Tensor, x: torch.Tensor
) -> Callable[[int], object]:
    def one() -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.to(x.dtype, copy=True), requires_grad=False)
        return make(linear)

    modules = [one() for _ in range(copies([weight.to(torch.int8)]))]
    return lambda i: modules[i % len(modules)](x)


def installed_peers(weight: torch.Tensor, x: torch.Tensor, x16: torch.Tensor) -> dict[str, Callable[[int], object]]:
    """Peers from other packages; what is not installed is said and left out."""
    found: dict[str, Callable[[int], object]] = {}
    try:
        from optimum.quanto import freeze, qint8, quantize

        def quanto(linear: nn.Linear) -> nn.Module:
            model = nn.Sequential(linear)
            quantize(model, weights=qint8)
            freeze(model)
            return model

        found["quanto qint8 fp32"] = module_peer(quanto, weight, x)
        found["quanto qint8 bf16"] = module_peer(quanto, weight, x16)
    except ImportError:
        print("not installed: optimum-quanto")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        def torchao(linear: nn.Linear) -> nn.Module:
            model = nn.Sequential(linear)
            quantize_(model, Int8WeightOnlyConfig())
            return model

        found["torchao int8 fp32"] = module_peer(torchao, weight, x)
        found["torchao int8 bf16"] = module_peer(torchao, weight, x16)
    except ImportError:
        print("not installed: torchao")
    return found


def qins_peers(weight: torch.Tensor, x: torch.Tensor, isas: tuple[str, ...]) -> dict[str, Callable[[int], object]]:
    found: dict[str, Callable[[int], object]] = {}
    for codec, group in FORMATS:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        first = qins.QINSLinear.from_linear(linear, codec, group_size=group)
        buffers = list(first.buffers())
        layers = [first]
        for _ in range(copies(buffers) - 1):
            twin = qins.QINSLinear(*weight.shape[::-1], False, codec=codec, group_size=group, device="meta")
            twin.to_empty(device="cpu").load_state_dict(first.state_dict())
            layers.append(twin)
        name = f"{codec}/{group}" if group else codec
        for isa in isas:

            def run(i: int, isa: str = isa, layers: list[nn.Module] = layers) -> object:
                qins.use_isa(isa)
                return layers[i % len(layers)](x)

            found[f"{name} {isa} {str(x.dtype)[6:]}"] = run
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--shape", default="8192x3072", help="out_features x in_features")
    parser.add_argument("--isas", nargs="+", default=[qins.isas()[0]])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    out_features, in_features = map(int, arguments.shape.split("x"))
    weight = torch.randn(out_features, in_features) * 0.02
    result = {"machine": machine(), "shape": [out_features, in_features], "milliseconds": {}}
    print(result["machine"])
    codes = [
        torch.randint(1, 255, weight.shape, dtype=torch.uint8).numpy() for _ in range(copies([weight.to(torch.int8)]))
    ]
    for rows in arguments.rows:
        x = torch.randn(rows, in_features)
        x16 = x.bfloat16()
        contestants: dict[str, Callable[[int], object]] = {
            "plain read of 1 byte a weight": lambda i: _core.read(codes[i % len(codes)], qins.get_num_threads()),
            "torch fp32": float_peer(weight, x),
            "torch bf16": float_peer(weight, x16),
            "torch _weight_int8pack_mm": int8pack_peer(weight, x16),
            **installed_peers(weight, x, x16),
            **qins_peers(weight, x, tuple(arguments.isas)),
            **qins_peers(weight, x16, tuple(arguments.isas)),
        }
        with torch.inference_mode():
            times = race(contestants, arguments.seconds)
        result["milliseconds"][rows] = {n: t * 1e3 for n, t in times.items()}
        read, fp32, bf16 = (times[n] for n in list(times)[:3])
        print(f"\n{rows} rows of x\n{'':34}{'ms':>9}{'of read':>9}{'x fp32':>8}{'x bf16':>8}")
        for name, t in times.items():
            print(f"{name:34}{t * 1e3:9.3f}{read / t:9.2f}{fp32 / t:8.2f}{bf16 / t:8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
