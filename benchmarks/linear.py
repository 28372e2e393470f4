"""Speed of x @ W.T for a few rows of x: QINSLinear, every installed peer, and a plain read of the codes.

    python benchmarks/linear.py [--rows 1 2 4 8 ...] [--shapes 8192x3072 ... | phi35] [--json FILE] [--plot PNG]

Weights rotate through more memory than the last-level cache (at most 2 GiB; peers from other packages rotate through
eight layers, to their advantage). All contestants take turns in one process, and the best of many repetitions counts.
Compare figures of one run, not of two.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import qins
from qins import _core
from qins.cli.bench import machine, race, rotation_bytes

FORMATS = [("log8", None), ("log8", 128), ("log8", 64), ("log8", 32), ("log9", None), ("golden", None)]
ROTATION_LIMIT = 2 << 30
PEER_COPIES = 8
PHI35 = ["9216x3072", "3072x3072", "16384x3072", "3072x8192"]  # its linear layers


def copies(tensors: list[torch.Tensor]) -> int:
    size = sum(t.numel() * t.element_size() for t in tensors)
    return max(2, min(rotation_bytes(), ROTATION_LIMIT) // size)


def float_peer(weight: torch.Tensor, x: torch.Tensor) -> Callable[[int], object]:
    weights = [weight.to(x.dtype, copy=True) for _ in range(copies([weight.to(x.dtype)]))]
    return lambda i: functional.linear(x, weights[i % len(weights)])


def int8pack_peer(weight: torch.Tensor, x: torch.Tensor) -> Callable[[int], object]:
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    all_codes = [codes.clone() for _ in range(copies([codes]))]
    scale = scale.bfloat16()
    return lambda i: torch._weight_int8pack_mm(x, all_codes[i % len(all_codes)], scale)


def modules_of(make: Callable[[nn.Linear], nn.Module], weight: torch.Tensor, dtype: torch.dtype) -> list[nn.Module]:
    """Return layers of a peer: quantized once, since that may take seconds, and then copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    first = make(copy.deepcopy(linear))
    with torch.inference_mode():
        first(torch.zeros(1, weight.shape[1], dtype=dtype))
    try:
        return [first, *(copy.deepcopy(first) for _ in range(PEER_COPIES - 1))]
    except RuntimeError:  # quanto's tensors cannot be copied
        return [first, *(make(copy.deepcopy(linear)) for _ in range(PEER_COPIES - 1))]


def quanto(linear: nn.Linear) -> nn.Module:
    from optimum.quanto import freeze, qint8, quantize

    model = nn.Sequential(linear)
    quantize(model, weights=qint8)
    freeze(model)
    return model


def torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def torchao_dynamic(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def torch_dynamic(linear: nn.Linear) -> nn.Module:
    model: nn.Module = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
    return model


def bitsandbytes(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=8, group_size=64)
    return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


# the quantizing function, and the dtype of the activations
PEERS: dict[str, tuple[Callable[[nn.Linear], nn.Module], torch.dtype]] = {
    "quanto qint8 fp32": (quanto, torch.float32),
    "quanto qint8 bf16": (quanto, torch.bfloat16),
    "torchao int8 fp32": (torchao, torch.float32),
    "torchao int8 bf16": (torchao, torch.bfloat16),
    "torchao int8 dynamic fp32": (torchao_dynamic, torch.float32),
    "torch dynamic int8 fp32": (torch_dynamic, torch.float32),
    "bitsandbytes int8 fp32": (bitsandbytes, torch.float32),
    "HQQ 8-bit fp32": (hqq, torch.float32),
}


def installed_peers(weight: torch.Tensor) -> dict[str, tuple[list[nn.Module], torch.dtype]]:
    """Return the layers and dtype of each peer; print and skip peers that are not installed or fail."""
    found = {}
    for name, (make, dtype) in PEERS.items():
        try:
            found[name] = modules_of(make, weight, dtype), dtype
        except ImportError as e:
            print(f"NOT RUN {name}: {e}")
        except Exception as e:  # whatever a peer raises; the others still race
            print(f"NOT RUN {name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    return found


def in_turn(modules: list[nn.Module], x: torch.Tensor) -> Callable[[int], object]:
    return lambda i: modules[i % len(modules)](x)


def qins_layers(weight: torch.Tensor) -> dict[str, list[qins.QINSLinear]]:
    """Return layers of each format, as many as the rotation needs."""
    found = {}
    for codec, group in FORMATS:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        first = qins.QINSLinear.from_linear(linear, codec, group_size=group)
        layers = [first]
        for _ in range(copies(list(first.buffers())) - 1):
            twin = qins.QINSLinear(*weight.shape[::-1], False, codec=codec, group_size=group, device="meta")
            twin.to_empty(device="cpu").load_state_dict(first.state_dict())
            layers.append(twin)
        found[f"{codec}/{group}" if group else codec] = layers
    return found


def qins_peers(
    layers: dict[str, list[qins.QINSLinear]], inputs: list[torch.Tensor], isas: tuple[str, ...]
) -> dict[str, Callable[[int], object]]:
    """Return contestants that share layers; offsets in the rotation keep one from warming the cache for another."""

    def run(x: torch.Tensor, isa: str, modules: list[qins.QINSLinear], part: float) -> Callable[[int], object]:
        def call(i: int) -> object:
            qins.use_isa(isa)
            return modules[(i + int(part * len(modules))) % len(modules)](x)

        return call

    ways = [(x, isa) for x in inputs for isa in isas]
    return {
        f"{name} {isa} {str(x.dtype)[6:]}": run(x, isa, modules, (j + 1) / (len(ways) + 1))
        for j, (x, isa) in enumerate(ways)
        for name, modules in layers.items()
    }


def race_shape(shape: tuple[int, int], arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Return milliseconds by rows of x and contestant; print each table when it is done."""
    out_features, in_features = shape
    weight = torch.randn(out_features, in_features) * 0.02
    milliseconds: dict[int, dict[str, float]] = {}
    peers = {} if arguments.no_peers else installed_peers(weight)
    layers = qins_layers(weight)
    # the same arrays that log8 multiplies with, since alignment changes the time of a plain read by a sixth
    codes = [layer.get_buffer("codes").numpy() for layer in layers["log8"]]
    for rows in arguments.rows:
        x = torch.randn(rows, in_features)
        x16 = x.bfloat16()
        contestants: dict[str, Callable[[int], object]] = {
            "plain read of 1 byte per weight": lambda i: _core.read(codes[i % len(codes)], qins.get_num_threads()),
            "torch fp32": float_peer(weight, x),
            "torch bf16": float_peer(weight, x16),
            "torch _weight_int8pack_mm": int8pack_peer(weight, x16),
            **{name: in_turn(modules, x.to(dtype)) for name, (modules, dtype) in peers.items()},
            **qins_peers(layers, [x, x16], tuple(arguments.isas)),
        }
        with torch.inference_mode():
            times = race(contestants, arguments.seconds)
        milliseconds[rows] = {n: t * 1e3 for n, t in times.items()}
        read, fp32, bf16 = (times[n] for n in list(times)[:3])
        title = f"{out_features}x{in_features}, {rows} rows of x"
        print(f"\n{title:34}{'ms':>9}{'of read':>9}{'x fp32':>8}{'x bf16':>8}")
        for name, t in times.items():
            print(f"{name:34}{t * 1e3:9.3f}{read / t:9.2f}{fp32 / t:8.2f}{bf16 / t:8.2f}")
    return milliseconds


def plot(milliseconds: dict[int, dict[str, float]], title: str, path: Path) -> None:
    """Plot microseconds per row of x against rows, one line per contestant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(9, 5.5), layout="constrained")
    rows = list(milliseconds)
    for name in milliseconds[rows[0]]:
        ours = "log8" in name or "log9" in name or "golden" in name
        line = [1e3 * milliseconds[r][name] / r for r in rows]
        ax.plot(rows, line, "o-" if ours else "s--", label=name, linewidth=2 if ours else 1, markersize=4)
    ax.set(xscale="log", yscale="log", xlabel="rows of x", ylabel="microseconds per row", title=title)
    ax.legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=["8192x3072"], help="out_features x in_features, or phi35")
    parser.add_argument("--isas", nargs="+", default=[qins.isas()[0]])
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds per figure")
    parser.add_argument("--no-peers", action="store_true", help="compare with torch only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="plot of the first shape")
    arguments = parser.parse_args()
    print(machine())
    names = [n for s in arguments.shapes for n in (PHI35 if s == "phi35" else [s])]
    results = {}
    for name in names:
        out_features, in_features = map(int, name.split("x"))
        results[name] = race_shape((out_features, in_features), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "milliseconds": results}, indent=2))
    if arguments.plot:
        plot(results[names[0]], f"{names[0]}, {machine()['threads']} threads", arguments.plot)


if __name__ == "__main__":
    main()
