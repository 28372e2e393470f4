"""log8 and Q8_0 on several models, each prediction compared with the float model's: is the default good everywhere?

    python benchmarks/fidelity.py [--models ...] [--formats ... | --ladder] [--unit FORMAT] [--json FILE]

Models: SmolLM2-135M-Instruct (dequantized from a 4-bit GGUF file: each block of 32 weights has at most 16 values),
all-MiniLM-L6-v2 (float32), Whisper tiny.en (float16; its decoder, on speech by espeak-ng), and random weights: with
heavy tails and outlier channels, in rows that 64 does not divide. Distance: KL divergence of each prediction in nats;
for the encoder, 1 - cosine of each text's embedding. Each format's difference from the unit (Q8_0) is paired,
prediction by prediction: mean and standard error, as fractions of the unit's mean distance.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import packaged_models
import torch
import transformers
from ggml_peers import add_peers
from measurements import embeddings, retrieval
from torch import nn

import qins
from qins.cli.bench import machine
from qins.fidelity import PEERS, evaluation, metrics
from qins.fidelity.recording import left_out
from qins.hf import find_model, load_causal_lm

FORMATS = ["log8", "log8/128", "log8/32", "calibrated", "calibrated/128", "Q8_0", "uint8 per 64"]
LADDER = ["log4", "Q4_0", "NF4", "IQ4_NL", "Q4_K", "log5", "Q5_0", "Q5_K", "log6", "Q6_K", "log8", "Q8_0"]


@dataclass
class Subject:
    """A float model.

    Attributes:
        model: the model, in float32.
        answer: the model's answers: a row of log probabilities for each prediction, or of a unit vector for each text.
        calibration: batches to calibrate on, none of which answers are about.
        are_states: whether the answers are vectors.

    """

    model: nn.Module
    answer: Callable[[Any], torch.Tensor]
    calibration: list[Any]
    are_states: bool = False


def predictions(batches: list[dict[str, torch.Tensor]], skip: int = 0) -> Callable[[Any], torch.Tensor]:
    """Return a function that gives a model's log probabilities at all positions of the batches but the first `skip`."""

    def answer(model: Any) -> torch.Tensor:
        logits = torch.cat([model(**b).logits[:, skip:].flatten(0, 1) for b in batches])
        return logits.log_softmax(-1)

    return answer


def smollm2() -> Subject:
    model, tokenizer = load_causal_lm(find_model())
    ids = tokenizer(metrics.sample_text(), return_tensors="pt").input_ids[0]
    tested, rest = ids[:2048].view(4, 512), ids[2048:]
    calibration = list(rest[: len(rest) // 512 * 512].view(-1, 1, 512))
    return Subject(model, predictions([{"input_ids": w[None]} for w in tested]), calibration)


def encoder() -> Subject:
    model = transformers.AutoModel.from_pretrained(packaged_models.minilm()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged_models.minilm())
    queries, documents, other = retrieval()
    batches = [dict(tokenizer(p, return_tensors="pt", truncation=True, max_length=256)) for p in other]
    return Subject(model, lambda m: embeddings(m, tokenizer, queries + documents), batches, are_states=True)


def speech() -> Subject:
    directory = packaged_models.whisper()
    model = transformers.WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", " ".join(metrics.sample_text().split())) if 60 < len(s) < 300]
    batches = packaged_models.inputs(directory, sentences[:72])
    return Subject(model, predictions(batches[:40], skip=1), batches[40:])


def random_weights() -> Subject:
    """Weights of Student's t with 3 degrees of freedom, 1 % of the inputs 8 times larger, rows of 336 and 920."""
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=336, intermediate_size=920, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    student = torch.distributions.StudentT(3.0)
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            weight = student.sample(layer.weight.shape) / math.sqrt(3 * layer.in_features)
            weight[:, torch.randperm(layer.in_features)[: -(-layer.in_features // 100)]] *= 8
            layer.weight.data = weight
    ids = torch.randint(2000, (24, 256))
    return Subject(model, predictions([{"input_ids": w[None]} for w in ids[:8]]), list(ids[8:, None]))


MODELS: dict[str, Callable[[], Subject]] = {
    "SmolLM2": smollm2,
    "MiniLM": encoder,
    "Whisper": speech,
    "random": random_weights,
}


def made(subject: Subject, name: str) -> tuple[nn.Module, float]:
    """Return the model in a format, and its bits per quantized weight."""
    model = copy.deepcopy(subject.model)
    if name in PEERS:
        return model, evaluation.as_peer(model, name).bits
    left = left_out(model)
    codec, _, size = name.partition("/")
    group_size: int | str = int(size) if size else "default"
    if codec == "calibrated":
        report = qins.calibrate(model, subject.calibration, group_size=group_size, exclude=left)
    else:
        report = qins.convert(model, codec, group_size=group_size, exclude=left)
    return model, evaluation.bits_of(report)


def distances(expected: torch.Tensor, got: torch.Tensor, are_states: bool) -> torch.Tensor:
    """Return the distance of each prediction, float64."""
    if are_states:
        return 1 - (expected.double() * got.double()).sum(1)
    return torch.cat(
        [(e.exp() * (e - g)).sum(1) for e, g in zip(expected.double().split(64), got.double().split(64), strict=True)]
    )


@torch.no_grad()
def judge(name: str, formats: list[str], unit_name: str) -> list[dict[str, Any]]:
    """Print and return the figures of one model."""
    subject = MODELS[name]()
    expected = subject.answer(subject.model)
    found: dict[str, tuple[float, torch.Tensor, float]] = {}
    for f in dict.fromkeys([unit_name, *formats]):
        model, bits = made(subject, f)
        got = subject.answer(model)
        same = float((expected.argmax(1) == got.argmax(1)).double().mean())
        found[f] = bits, distances(expected, got, subject.are_states), same
    unit = found[unit_name][1]
    print(f"\n{name}: {len(unit):,} {'embeddings' if subject.are_states else 'predictions'}")
    print(f"{'format':16} {'bits':>6} {'distance':>10} {'of ' + unit_name:>8} {'standard error':>14} {'top-1':>8}")
    rows = []
    for f in formats:
        bits, distance, same = found[f]
        ratio, error = (
            float(distance.mean() / unit.mean()),
            metrics.standard_error(distance - unit) / float(unit.mean()),
        )
        shown = "" if subject.are_states else f"{100 * same:.2f} %"
        print(f"{f:16} {bits:6.2f} {float(distance.mean()):10.2e} {ratio:8.2f} {error:14.2f} {shown:>8}", flush=True)
        row = {"model": name, "format": f, "bits": bits, "distance": float(distance.mean()), "of_unit": ratio}
        rows.append({**row, "standard_error": error, "top_1": None if subject.are_states else same})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--formats", nargs="+", default=FORMATS, help="a codec, calibrated, with /group size; or a peer"
    )
    parser.add_argument("--ladder", action="store_true", help="formats of 4 to 8 bits, llama.cpp's and ours")
    parser.add_argument("--unit", default="Q8_0", help="the format to compare with")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(machine())
    missing = add_peers()
    formats = [f for f in (LADDER if arguments.ladder else arguments.formats) if f not in missing]
    if missing:
        print(f"NOT RUN: {', '.join(missing)} (llama-cpp-python is not installed)")
    results = []
    for name in arguments.models:
        if name == "Whisper" and shutil.which("espeak-ng") is None:
            print("\nWhisper: NOT RUN (espeak-ng is not installed)")
            continue
        results += judge(name, formats, arguments.unit)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}))


if __name__ == "__main__":
    main()
