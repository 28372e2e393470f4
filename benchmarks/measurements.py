"""Measures the figures of docs/measurements.md, writes the page and draws docs/why-qins.svg: `make measurements`.

    python benchmarks/measurements.py [--write docs/measurements.md] [--tokens 2048]

It measures all figures: sizes from the tensors and files themselves, fidelity on SmolLM2-135M-Instruct and the text
that ships with the package, speed of a model in Phi-3.5-mini's shape (which needs 17 GB of memory), greedy tokens of a
Phi-3 model with SmolLM2's weights, and embeddings of all-MiniLM-L6-v2. With --write, picture.py then draws
why-qins.svg from the tables of the page, next to it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import inspect
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

import qins
from qins import rational
from qins.cli.bench import machine
from qins.fidelity import PEERS, evaluation, metrics
from qins.hf import find_model, load_causal_lm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import kv_cache
import phi
import picture
import toy
from packaged_models import minilm

warnings.simplefilter("ignore", DeprecationWarning)
MB = 1e6

CODECS: dict[str, tuple[str, int | str | None]] = {
    "`golden`": ("golden", None),
    "`log9`": ("log9", None),
    "`log8`, per row": ("log8", None),
    "`log8` (default groups)": ("log8", "default"),
    "`log8`, group_size 128": ("log8", 128),
    "`log8`, group_size 32": ("log8", 32),
    "`rational`, alpha 1": ("rational", None),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


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
    return table(["format", "MiB", "model", "encoded layers"], rows)


def quantized_in_name() -> str:
    linear = nn.Linear(3072, 3072, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    w = linear.weight.detach()
    rows = []
    for name, quantize in (("as the prototype stored it", False), ("as qins stores it", True)):
        layer = rational.QINSWeightLinear(linear, quantize=quantize)
        report = qins.memory_report(layer)
        problem = "; ".join(p.split(": ", 1)[1] for p in report.problems) or "none"
        size = f"{report.total_bytes / MB:.1f}"
        rows.append([name, str(layer.w_encoded.dtype)[6:], size, f"{report.compression:.2f}x",
                     f"{snr(w, layer.decode_weight()):.1f}", problem])  # fmt: skip
    # the prototype's own mapping of z to bytes, which was never switched on
    z = rational.qins_encode(w)
    old = ((z + 1) * 127.5).round().to(torch.uint8)
    rows.append(["the prototype's mapping to bytes", "uint8", f"{w.numel() / MB:.1f}", "4.00x",
                 f"{snr(w, rational.qins_decode(old, is_quantized=True)):.1f}", ""])  # fmt: skip
    return table(["rational codec", "dtype", "MB", "compression", "SNR dB", "problem that memory_report finds"], rows)


def snr(w: torch.Tensor, d: torch.Tensor) -> float:
    noise = float((w - d).double().square().sum())
    return float(10 * np.log10(float(w.double().square().sum()) / noise)) if noise else float("inf")


def fidelity(found: evaluation.Evaluation) -> str:
    rows = []
    for m in found.measured:
        f = m.comparison.summary()
        noise = [10 ** (-x["weight_snr_db"] / 10) for x in m.layers.values() if "weight_snr_db" in x]
        snr_db = f"{-10 * np.log10(np.mean(noise)):.2f}" if noise else ""
        log_ratio = f"{100 * f.log_ratio:+.2f} ± {100 * f.log_ratio_error:.2f} %"
        rows.append(
            [
                m.name,
                f"{m.bits:.2f}",
                snr_db,
                f"{f.kl_mean:.2e} ± {f.kl_mean_error:.0e}",
                f"{f.kl_p99:.1e}",
                *(f"{100 * x:.2f} %" for x in (f.top1, f.top5)),
                log_ratio,
                f"{100 * m.forced:.1f} %",
            ]
        )
    head = ["format", "bits per weight", "SNR dB", "mean KLD", "p99", "top-1", "top-5", "log perplexity", "forced"]
    return table(head, rows)


# -- an encoder ------------------------------------------------------------------------------------


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: object, texts: list[str]) -> torch.Tensor:
    """Return normalized means of the last hidden states, as sentence-transformers does for this model."""
    made = []
    for text in texts:
        out = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256))
        made.append(nn.functional.normalize(out.last_hidden_state.mean(1), dim=1))
    return torch.cat(made)


def retrieval() -> tuple[list[str], list[str], list[str]]:
    """Return queries, the first half of each passage; documents, the second halves; and passages to calibrate on."""
    passages = [" ".join(p.split()) for p in metrics.sample_text().split("\n\n")]
    passages = [p for p in passages if len(p.split()) >= 24]
    asked, other = passages[::2], passages[1::2]
    cut = [len(p.split()) // 2 for p in asked]
    queries = [" ".join(p.split()[:n]) for p, n in zip(asked, cut, strict=True)]
    return queries, [" ".join(p.split()[n:]) for p, n in zip(asked, cut, strict=True)], other


def encoder() -> str:
    directory = minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    queries, documents, other = retrieval()
    batches = [dict(tokenizer(p, return_tensors="pt", truncation=True, max_length=256)) for p in other]
    expected = embeddings(model, tokenizer, queries), embeddings(model, tokenizer, documents)
    scores = expected[0] @ expected[1].T
    right = torch.arange(len(queries))
    rows = [["float32", "32", "1", "1", "1", f"{(scores.argmax(1) == right).sum()} of {len(queries)}"]]

    def made(name: str) -> tuple[nn.Module, float]:
        changed = copy.deepcopy(model)
        if name in PEERS:
            return changed, evaluation.as_peer(changed, name).bits
        if name == "calibrated":
            report = qins.calibrate(changed, batches)
        else:
            per_row = name == "log8 per row"
            report = qins.convert(changed, "log8" if per_row else name, group_size=None if per_row else "default")
        return changed, evaluation.bits_of(report)

    for name in ("log8", "calibrated", "log8 per row", "golden", "rational", *PEERS):
        changed, bits = made(name)
        got = embeddings(changed, tokenizer, queries), embeddings(changed, tokenizer, documents)
        cosine = torch.cat([(a * b).sum(1) for a, b in zip(expected, got, strict=True)])
        mine = got[0] @ got[1].T
        ranks = [s.argsort(1).argsort(1).double() for s in (scores, mine)]
        spearman = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)])
        hits = int((mine.argmax(1) == right).sum())
        rows.append([name, f"{bits:.2f}", f"1 - {1 - float(cosine.mean()):.1e}", f"1 - {1 - float(cosine.min()):.1e}",
                     f"{float(spearman.mean()):.5f}", f"{hits} of {len(queries)}"])  # fmt: skip
    return table(["format", "bits per weight", "mean cosine", "lowest", "rank agreement", "right first"], rows)


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
    head = ["format", "codes MB", "signs", "ranges", "other", "encoded layers", "in memory", "on disk", "overhead MB"]
    return table(head, rows)


@torch.no_grad()
def phi_tokens(model: nn.Module, tokenizer: object) -> str:
    original = phi.from_llama(model)

    def run(m: nn.Module) -> list[list[int]]:
        return [metrics.greedy(m, tokenizer(p, return_tensors="pt").input_ids, 15)[0].tolist() for p in phi.PROMPTS]

    expected, rows = run(original), []
    for name, (codec, group) in CODECS.items():
        converted = copy.deepcopy(original)
        report = qins.convert(converted, codec, group_size=group)
        got = run(converted)
        same = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(got, expected, strict=True)]
        rows.append([name, f"{same[0]} of 15", f"{sum(same)} of {15 * len(phi.PROMPTS)}", f"{report.compression:.3f}x",
                     f"{qins.memory_report(converted).compression:.2f}x"])  # fmt: skip
    return table(["format", 'after "The capital of France is"', "all prompts", "encoded layers", "model"], rows)


# -- a large model -----------------------------------------------------------------------------------

SPEED_MODEL = "phi35"
SPEED_NAMES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "log8 fp32": "`log8`, the rest float32",
    "log8 bf16": "`log8`, the rest bfloat16",
    "llama.cpp Q8_0": "llama.cpp Q8_0",
}


def speeds() -> tuple[str, str]:
    """Run generate.py on a large model; return the table, and a sentence on the contestants that did not run."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "speed.json"
        script = str(Path(__file__).with_name("generate.py"))
        subprocess.run([sys.executable, script, "--model", SPEED_MODEL, "--json", str(path)], check=True)
        results = json.loads(path.read_text("utf-8"))["results"]
    rows = []
    for name, shown in SPEED_NAMES.items():
        if name in results:
            r = results[name]
            values = [r["decode tokens/s"], r["prefill tokens/s"], r["weights MB"] / 1e3, r["peak resident MB"] / 1e3]
            rows.append([shown, *(f"{float(f'{v:.3g}'):g}" for v in values)])
    missing = [shown for name, shown in SPEED_NAMES.items() if name not in results]
    about = f"Not installed here, so not measured: {', '.join(missing)}." if missing else "Everything in one run."
    return table(["format", "decode tokens/s", "prefill tokens/s", "weights GB", "peak RAM GB"], rows), about


def page(tokens: int) -> str:
    names = [*evaluation.CODECS, *PEERS, evaluation.WHOLE_BF16]
    found = evaluation.evaluate_all(None, names, evaluation.Settings(tokens=tokens))
    calibration = found.about["calibration"]
    code = evaluation.evaluate_all(
        None,
        ["log8", "calibrated", "calibrated to 8.13 bits", "Q8_0"],
        evaluation.Settings(text=inspect.getsource(argparse), tokens=tokens, calibration=metrics.sample_text()),
    )
    model, tokenizer = load_causal_lm(find_model())
    ids = tokenizer(metrics.sample_text(), return_tensors="pt").input_ids
    about = machine()
    speed, speed_about = speeds()
    converted, steps = copy.deepcopy(model), 100
    qins.convert(converted, exclude=(), embeddings=True)
    caches = kv_cache.table(kv_cache.race(converted, ids[:, :1000], steps))
    del converted
    return f"""# Measurements

`make measurements` (`benchmarks/measurements.py`) measured this page on {datetime.date.today()}, on {about["cpu"]},
{about["threads"]} threads, {", ".join(about["isas"])}; torch {torch.__version__.partition("+")[0]}.
Sizes come from the tensors and files themselves. Speeds, and the last digits of some figures, differ between machines.
[Performance](performance.md) has single layers and other machines.

![Weights in GB, decode and prefill speed, and KL divergence of float32, bfloat16, Q8_0 and log8](why-qins.svg)

## Fidelity

`qins eval` on SmolLM2-135M-Instruct, all linear layers but lm_head: {found.about["predictions"]:,} predictions of
English (the text that ships with the package), all formats in one run.

- KLD: KL divergence of the next-token distribution from the float32 model's, in nats, ± one standard error.
- SNR: squared weights over squared errors, with the relative errors averaged over the layers.
  [Formats](formats.md#signal-to-noise-ratio) has it over all weights together.
- top-1: share of predictions with the same most likely token. top-5: mean share of the float32 model's five most likely
  tokens that are among the five of the other model.
- log perplexity: its change from the float32 model's.
- forced: share of the float32 model's own greedy tokens that stay the most likely, given the tokens before them.
- bf16 model: the float model runs in bfloat16, activations included. bf16 weights: only its weights are rounded.
- calibrated: codes chosen on {calibration["tokens"]:,} other tokens of the same text, with
  {calibration["held_out"]:,} more held out. Statistics took {calibration["seconds_statistics"]:.0f} s, rounding
  {calibration["seconds_rounding"]:.0f} s.
- calibrated to 8.13 bits: `qins.plan` also chose the group size of each layer.

{fidelity(found)}

Text unlike the calibration text: {code.about["predictions"]:,} predictions of Python source code, with
codes still calibrated on English.

{fidelity(code)}

all-MiniLM-L6-v2, an encoder: embeddings of {len(retrieval()[0])} queries and as many passages of the same text. Each
query is the first half of a passage; calibration used other passages. Cosine: between an embedding and the float32
model's. Rank agreement: Spearman's correlation of the order of all passages for a query. Right first: queries whose own
passage ranks first.

{encoder()}

## Speed

`benchmarks/generate.py --model {SPEED_MODEL}`: the shape of Phi-3.5-mini, 3.8 billion random weights, one sequence.
Decode: 32 tokens after a prompt of 16. Prefill: a prompt of 512. Peak RAM: of the whole process while it generates.
{speed_about}

{speed}

## KV caches

SmolLM2 (`log8` weights, head and embeddings, too), 1,000 tokens of context, {steps} decode steps, all caches in turn
(`benchmarks/kv_cache.py`), on {about["cpu"]}, {datetime.date.today()}. DynamicCache holds float32. KLD: mean KL
divergence of the next token's distribution from that with DynamicCache, in nats. Read little into the greedy tokens of
a single run: one near-tie changes all that follow.

{caches}

## Files

`torch.save` of SmolLM2's state dict, read with `qins inspect`. lm_head shares the embedding's weight and stays float32.
"In memory" and "on disk" are compression of the whole model.

{saved_files(model)}

## Phi-3.5's architecture

SmolLM2's weights in a Phi-3 model (qkv_proj and gate_up_proj fused): greedy tokens that match the float32 model's. The
first different token changes all that follow. The prototype expected its layers to shrink 4x; `log8` reaches 3.9x.

{phi_tokens(model, tokenizer)}

`make test-slow` converts Phi-3.5-mini's full shape, 3.8 billion random parameters, in place, and reports peak memory.

## The prototype's 34x was 1.48x

The project's prototype reported a toy model of 13.91 MiB as 0.41 MiB, 34 times smaller. It had counted only parameters,
but codes are buffers. `qins.memory_report` counts parameters, buffers and tensors in plain attributes, each storage
once:

{toy_model()}

## The prototype's codes that were float32

The prototype's second codec called its layers quantized but kept them in float32, so a model of 13,824 MB stayed
13,824 MB. Its mapping to bytes, never switched on, would have left only a few distinct codes for all weights. One
3072x3072 layer:

{quantized_in_name()}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file to write, with the picture beside it; default: print the page")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    text = page(arguments.tokens)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
        arguments.write.with_name("why-qins.svg").write_text(picture.draw(text), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
