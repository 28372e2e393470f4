"""Measures what docs/measurements.md says and writes the page: `make measurements`.

    python benchmarks/measurements.py [--write docs/measurements.md] [--tokens 2044]

Everything is measured here and now: sizes from the tensors and files themselves, fidelity on SmolLM2-135M-Instruct and
the text that ships with the package, greedy tokens of a Phi-3 model that has SmolLM2's weights.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import qins
from qins import evaluate, rational
from qins.bench import machine
from qins.models import find_model, load_causal_lm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import kv_cache
import phi
import toy
from test_phi35 import PROMPTS

warnings.simplefilter("ignore", DeprecationWarning)
MB = 1e6

CODECS: dict[str, tuple[str, int | str | None]] = {
    "`golden`": ("golden", None),
    "`log9`": ("log9", None),
    "`log8`, one scale a row": ("log8", None),
    "`log8` (default groups)": ("log8", "default"),
    "`log8`, group_size 64": ("log8", 64),
    "`log8`, group_size 32": ("log8", 32),
    "`rational`, alpha 1": ("rational", None),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def int8_per_row(w: torch.Tensor) -> tuple[torch.Tensor, float]:
    scale = w.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (w / scale).round() * scale, 8 + 32 / w.shape[1]


def q8_0(w: torch.Tensor) -> tuple[torch.Tensor, float]:
    blocks = w.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros(()))
    return ((blocks * inverse).round() * scale.half().float()).reshape(w.shape), 8.5


def fp8(w: torch.Tensor) -> tuple[torch.Tensor, float]:
    scale = w.abs().amax(1, keepdim=True).clamp_min(1e-30) / 448
    return (w / scale).to(torch.float8_e4m3fn).float() * scale, 8 + 32 / w.shape[1]


def bf16(w: torch.Tensor) -> tuple[torch.Tensor, float]:
    return w.bfloat16().float(), 16.0


PEERS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, float]]] = {
    "int8, one scale a row": int8_per_row,
    "Q8_0 (llama.cpp)": q8_0,
    "fp8 e4m3, one scale a row": fp8,
    "bfloat16": bf16,
}


def coded(codec: str, group: int | str | None) -> Callable[[torch.Tensor], tuple[torch.Tensor, float]]:
    def run(w: torch.Tensor) -> tuple[torch.Tensor, float]:
        size = qins.default_group_size(w.shape[1]) if group == "default" else group
        e = qins.encode(w, codec, group_size=size)
        return torch.from_numpy(e.decode()), 8 * e.nbytes / w.numel()

    return run


def toy_model() -> str:
    rows, before = [], 0
    for name, codec in (("float32", None), ("`golden`", "golden"), ("`log9`", "log9"), ("`log8`", "log8")):
        model = toy.ToyModel()
        layers = qins.convert(model, codec).compression if codec else 1.0
        report = qins.memory_report(model)
        before = before or report.total_bytes
        rows.append(
            [name, f"{report.total_bytes / 2**20:.2f}", f"{before / report.total_bytes:.2f}x", f"{layers:.2f}x"]
        )
    return table(["weights", "MiB", "model", "encoded layers"], rows)


def quantised_in_name() -> str:
    linear = nn.Linear(3072, 3072, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    w = linear.weight.detach()
    rows = []
    for name, quantize in (("as the seed kept it", False), ("as it is kept here", True)):
        layer = rational.QINSWeightLinear(linear, quantize=quantize)
        report = qins.memory_report(layer)
        problem = "; ".join(p.split(": ", 1)[1] for p in report.problems) or "none"
        size = f"{report.total_bytes / MB:.1f}"
        rows.append([name, str(layer.w_encoded.dtype)[6:], size, f"{report.compression:.2f}x",
                     f"{snr(w, layer.decode_weight()):.1f}", problem])  # fmt: skip
    # the seed's own mapping of z to bytes, had it been switched on
    z = rational.qins_encode(w)
    old = ((z + 1) * 127.5).round().to(torch.uint8)
    rows.append(["the seed's mapping to bytes", "uint8", f"{w.numel() / MB:.1f}", "4.00x",
                 f"{snr(w, rational.qins_decode(old, is_quantized=True)):.1f}", ""])  # fmt: skip
    return table(["rational codec", "dtype", "MB", "compression", "SNR dB", "problem that memory_report names"], rows)


def snr(w: torch.Tensor, d: torch.Tensor) -> float:
    noise = float((w - d).double().square().sum())
    return float(10 * np.log10(float(w.double().square().sum()) / noise)) if noise else float("inf")


def fidelity(model: nn.Module, ids: torch.Tensor, tokens: int) -> str:
    rows = []
    windows = evaluate.windows(ids, tokens + 4, 512)
    layers = [m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    contestants = {**{n: coded(*c) for n, c in CODECS.items()}, **PEERS}
    for name, run in contestants.items():
        changed = copy.deepcopy(model)
        signal = noise = bits = 0.0
        targets = [m for n, m in changed.named_modules() if type(m) is nn.Linear and n != "lm_head"]
        for original, layer in zip(layers, targets, strict=True):
            w = original.weight.detach()
            d, b = run(w)
            layer.weight.data = d
            signal += float(w.double().square().sum())
            noise += float((w - d).double().square().sum())
            bits += b * w.numel()
        f = evaluate.fidelity(model, changed, windows)
        total = sum(m.weight.numel() for m in layers)
        rows.append([name, f"{bits / total:.2f}", f"{10 * np.log10(signal / noise):.2f}", f"{f.kl_mean:.2e}",
                     f"{f.kl_p99:.1e}", f"{100 * f.top1:.2f} %"])  # fmt: skip
    return table(["weights", "bits a weight", "SNR dB", "mean KLD", "p99", "same top token"], rows)


def saved_files(model: nn.Module) -> str:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, (codec, group) in CODECS.items():
            converted = copy.deepcopy(model)
            qins.convert(converted, codec, group_size=group)
            path = Path(directory) / "model.pt"
            torch.save(converted.state_dict(), path)
            r = qins.inspect(path)
            kinds = [f"{r.bytes_by_kind[k] / MB:.2f}" for k in ("stored", "sign", "range", "other")]
            rows.append([name, *kinds, f"{r.compression_of_layers:.2f}x", f"{r.compression_in_memory:.2f}x",
                         f"{r.compression_on_disk:.2f}x", f"{r.overhead_bytes / MB:.2f}"])  # fmt: skip
            del converted
    head = ["weights", "codes MB", "signs", "ranges", "other", "encoded layers", "in memory", "on disk", "overhead MB"]
    return table(head, rows)


@torch.no_grad()
def phi_tokens(model: nn.Module, tokenizer: object) -> str:
    original = phi.from_llama(model)

    def run(m: nn.Module) -> list[list[int]]:
        return [evaluate.greedy(m, tokenizer(p, return_tensors="pt").input_ids, 15)[0].tolist() for p in PROMPTS]

    expected, rows = run(original), []
    for name, (codec, group) in CODECS.items():
        converted = copy.deepcopy(original)
        report = qins.convert(converted, codec, group_size=group)
        got = run(converted)
        same = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(got, expected, strict=True)]
        rows.append([name, f"{same[0]} of 15", f"{sum(same)} of {15 * len(PROMPTS)}", f"{report.compression:.3f}x",
                     f"{qins.memory_report(converted).compression:.2f}x"])  # fmt: skip
    return table(["weights", 'after "The capital of France is"', "all prompts", "encoded layers", "model"], rows)


def page(tokens: int) -> str:
    model, tokenizer = load_causal_lm(find_model())
    ids = tokenizer(evaluate.sample_text(), return_tensors="pt").input_ids
    about = machine()
    converted = copy.deepcopy(model)
    qins.convert(converted)
    caches = kv_cache.table(kv_cache.race(converted, ids[:, :1000], 100))
    del converted
    return f"""# Measurements

Written by `make measurements` (`benchmarks/measurements.py`) on {about["cpu"]}, {about["threads"]} threads,
{", ".join(about["isas"])}; torch {torch.__version__.partition("+")[0]}. Sizes come from the tensors and the files
themselves; speeds and some last digits differ between machines. Speed of products:
[benchmarks](../benchmarks/README.md).

## The 34x that was 1.48x

The project's prototype reported a toy model of 13.91 MiB as 0.41 MiB: 34 times smaller. It had added up the parameters,
and codes are buffers. `qins.memory_report` reads parameters, buffers and tensors in plain attributes, each storage
once:

{toy_model()}

## Quantised in name only

The prototype's second codec called its layers quantised and kept them in float32, so a model of 13,824 MB stayed one of
13,824 MB. Its mapping to bytes, never switched on, would have left a few codes for all weights. One 3072x3072 layer:

{quantised_in_name()}

## Fidelity

SmolLM2-135M-Instruct, all linear layers but lm_head held as the decoded values, {tokens:,} predictions of English (the
text that ships with the package); KLD is that of the next-token distributions to the float32 model's.

{fidelity(model, ids, tokens)}

## Files

`torch.save` of SmolLM2's state dict, read with `qins inspect`; lm_head is the embedding and stays float32. "In memory"
and "on disk" are of the whole model.

{saved_files(model)}

## Phi-3.5's architecture

SmolLM2's weights in a Phi-3 model (qkv_proj and gate_up_proj joined): greedy tokens that are the float32 model's. The
first different token changes all that follow. The prototype expected 4x of its layers; `log8` gives 3.95x or more.

{phi_tokens(model, tokenizer)}

The 3.8 billion parameters of Phi-3.5-mini's own shape, random, convert in place layer by layer: `make test-slow`
reports the peak, and `benchmarks/generate.py --model phi35` the speed.

## KV caches

1,000 tokens of context and 100 steps of SmolLM2 (`log8` weights), all caches in turn (`benchmarks/kv_cache.py`);
DynamicCache holds float32. Of one greedy run the tokens say little: a single near-tie changes all that follow.

{caches}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file to write; otherwise the page is printed")
    parser.add_argument("--tokens", type=int, default=2044)
    arguments = parser.parse_args()
    text = page(arguments.tokens)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
