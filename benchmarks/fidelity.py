"""Formats of 4 to 8 bits on several models, each prediction compared with the float model's.

    python benchmarks/fidelity.py [--models ...] [--formats ... | --ladder] [--unit FORMAT] [--json FILE] [--plot FILE]

Models: SmolLM2-135M-Instruct (dequantized from a 4-bit GGUF file: each block of 32 weights has at most 16 values); the
same with each weight anywhere in the step that it was rounded to ("dithered"); all-MiniLM-L6-v2 (float32); Whisper
tiny.en (float16; its decoder, on speech by espeak-ng); and random weights: with heavy tails and outlier channels, in
rows that 64 does not divide. Distance: KL divergence of each prediction in nats; for the encoder, 1 - cosine of each
text's embedding. Each format's mean distance is also given as a fraction of the unit's, with the standard error of that
ratio, paired by prediction.

Formats: a codec; "calibrated" or "calibrated log4", with /group size if not the default; "plan 4.5", calibrated codes
of the plan for at most 4.5 bits per weight; GPTQ, or GPTQ/64 with smaller groups, calibrated on the same batches; other
peers by name.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ladder_picture
import numpy as np
import packaged_models
import torch
import transformers
from ggml_peers import add_peers
from gptq import Variant, quantized
from measurements import embeddings, retrieval
from torch import nn

import qins
from qins.calibration import Layer, Text, choose_layer, split
from qins.calibration.planning import Option, allocate, candidate_formats, options, sensitivities
from qins.calibration.rounds import Clock, rounds
from qins.cli.bench import machine
from qins.codec import DAMPING, EncodedArray, ErrorFeedback, format_of
from qins.fidelity import PEERS, evaluation, metrics
from qins.fidelity.recording import left_out
from qins.hf import find_model, load_causal_lm
from qins.nn import QINSLinear, choose

FORMATS = ["log8", "log8/128", "log8/32", "calibrated", "calibrated/128", "Q8_0", "uint8 per 64"]
RUNGS = ["log4", "log5", "log6", "log8"]
LADDER = [
    "Q4_K", "Q4_0", "NF4", "IQ4_NL", "Q5_K", "Q6_K", "Q8_0", "GPTQ", "GPTQ/64", *RUNGS, "calibrated log4/64",
    *(f"calibrated {codec}" for codec in RUNGS), *(f"plan {bits}" for bits in (4.25, 4.5, 5.25, 6.25, 7)),
]  # fmt: skip
# What the ladder promises: the distance of the first format is at most this share of the second's.
CLAIMS = [
    ("log4", "Q4_K", 1.0), ("log5", "Q5_K", 1.0), ("log6", "Q6_K", 1.0), ("calibrated log4", "Q4_K", 0.5),
    ("calibrated log5", "Q5_K", 0.5), ("calibrated log6", "Q6_K", 0.5), ("plan 4.25", "Q4_K", 0.5),
    ("plan 4.5", "Q4_K", 0.5),
    ("plan 5.25", "Q5_K", 0.5), ("plan 6.25", "Q6_K", 0.5), ("calibrated log4/64", "GPTQ", 0.8),
    ("calibrated log4", "GPTQ/64", 0.8), ("plan 4.25", "GPTQ", 0.8), ("plan 4.5", "GPTQ/64", 0.8),
    *((f"calibrated {codec}", codec, 0.95) for codec in RUNGS),
]  # fmt: skip
_FORMAT = re.compile(r"(?:(calibrated) ?)?([a-z]+[0-9]*)?(?:/([0-9]+))?|plan ([0-9.]+)|(GPTQ)(?:/([0-9]+))?")


class Inputs(NamedTuple):
    """What calibration knows of a layer's inputs.

    Attributes:
        gram: (K, K), the sum of x x^T over tokens x.
        held: (tokens, K), inputs of other tokens.

    """

    gram: np.ndarray[Any, Any]
    held: torch.Tensor


@dataclass
class Subject:
    """A float model.

    Attributes:
        model: the model, in float32.
        answer: the model's answers: a row of log probabilities for each prediction, or of a unit vector for each text.
        calibration: batches to calibrate on, none of which answers are about.
        are_states: whether the answers are vectors.
        made: error feedback that several formats share, by the id of its second moments.
        choices: codes that several formats share.

    """

    model: nn.Module
    answer: Callable[[Any], torch.Tensor]
    calibration: list[Any]
    are_states: bool = False
    made: dict[int, ErrorFeedback] = field(default_factory=dict)
    choices: dict[tuple[str, str, int | None], EncodedArray] = field(default_factory=dict)

    @cached_property
    def text(self) -> Text:
        """The batches for statistics, and those on which codes are compared."""
        return split(self.calibration)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The layers to quantize."""
        return {n: Layer(m, "log8", None) for m, n in choose(self.model, exclude=left_out(self.model)).items()}

    @cached_property
    def inputs(self) -> dict[str, Inputs]:
        """Each layer's inputs, collected once for all formats that calibrate, as `qins.calibrate` does."""
        found = rounds(
            self.model, self.layers, self.text, DAMPING, 128 << 20, False, Clock(), feedback_of=lambda gram, _: gram
        )
        return {n: Inputs(*about) for n, *about in found}

    @cached_property
    def options(self) -> dict[str, list[Option]]:
        """Each layer's options, from which plans choose."""
        with torch.enable_grad():
            weighed, _ = sensitivities(self.model, self.layers, [*self.text.held, *self.text.batches])
        found = {n: [Option(None, 8.0, 0.0)] for n in self.layers}  # of a pooler, after the states that are compared
        for n, weights in weighed.items():
            formats = candidate_formats(self.layers[n].weight.shape[1], True)
            found[n] = options(self.layers[n], self.feedback(n), self.inputs[n].held, weights, formats)
        return found

    def feedback(self, name: str) -> ErrorFeedback:
        """Return a layer's error feedback; layers with the same input share it."""
        gram = self.inputs[name].gram
        if id(gram) not in self.made:
            self.made[id(gram)] = ErrorFeedback(gram)
        return self.made[id(gram)]

    def planned(self, bits: float) -> dict[str, tuple[str, int | None]]:
        """Return each layer's format by the plan for at most so many bits per weight."""
        plan = allocate(self.options, {n: m.weight.numel() for n, m in self.layers.items()}, target_bits=bits)
        return plan.formats

    def calibrate(self, model: nn.Module, wanted: dict[str, tuple[str, int | None]]) -> float:
        """Give a copy of the model the codes that `qins.calibrate` chooses; return bits per weight.

        Layers that are not wanted stay in float, and count.
        """
        bits = weights = 0
        for name, layer in self.layers.items():
            weight = layer.weight
            weights += weight.numel()
            if name not in wanted:
                bits += 8 * weight.element_size() * weight.numel()
                continue
            codec, size = wanted[name]
            key = name, codec, size
            if key not in self.choices:
                choice = choose_layer(weight, codec, size, self.feedback(name), self.inputs[name].held)
                self.choices[key] = choice.encoded
            e = self.choices[key]
            model.set_submodule(name, QINSLinear.from_encoded(model.get_submodule(name), e, codec, size))
            bits += 8 * e.nbytes
        return bits / weights

    def gptq(self, model: nn.Module, group_size: int) -> float:
        """Give a copy of the model GPTQ's values; return bits per weight."""
        variant, bits, weights = Variant(group_size), 0.0, 0
        for name, inputs in self.inputs.items():
            weight = self.layers[name].weight
            gram = torch.from_numpy(inputs.gram) + inputs.held.T @ inputs.held  # it holds nothing out
            model.get_submodule(name).weight.data = quantized(weight, gram, variant)
            bits, weights = bits + variant.bits(weight.shape[1]) * weight.numel(), weights + weight.numel()
        return bits / weights


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


def dithered() -> Subject:
    """SmolLM2's weights lie on Q4_1's grid, which Q4_K and Q5_K nearly contain; these lie anywhere between."""
    subject = smollm2()
    generator = torch.Generator().manual_seed(0)
    for layer in subject.layers.values():
        blocks = layer.weight.unflatten(1, (-1, 32))
        step = (blocks.amax(2, keepdim=True) - blocks.amin(2, keepdim=True)) / 15
        blocks += step * (torch.rand(blocks.shape, generator=generator) - 0.5)
    return subject


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
    "dithered": dithered,
    "MiniLM": encoder,
    "Whisper": speech,
    "random": random_weights,
}


def made(subject: Subject, name: str) -> tuple[nn.Module, float]:
    """Return the model in a format, and its bits per quantized weight."""
    model = copy.deepcopy(subject.model)
    if name in PEERS:
        return model, evaluation.as_peer(model, name).bits
    told = _FORMAT.fullmatch(name)
    if told is None:
        raise ValueError(f"--formats: expected a codec, calibrated, plan, GPTQ or a peer, got {name!r}")
    calibrated, codec, size, target, gptq, columns = told.groups()
    if gptq:
        return model, subject.gptq(model, int(columns or 128))
    if target:
        return model, subject.calibrate(model, subject.planned(float(target)))
    group_size: int | str = int(size) if size else "default"
    if calibrated:
        wanted = {n: format_of(codec or "log8", group_size, m.weight.shape[1]) for n, m in subject.layers.items()}
        return model, subject.calibrate(model, wanted)
    report = qins.convert(model, codec, group_size=group_size, exclude=left_out(model))
    return model, evaluation.bits_of(report)


def distances(expected: torch.Tensor, got: torch.Tensor, are_states: bool) -> torch.Tensor:
    """Return the distance of each prediction, float64."""
    if are_states:
        return 1 - (expected.double() * got.double()).sum(1)
    return torch.cat(
        [(e.exp() * (e - g)).sum(1) for e, g in zip(expected.double().split(64), got.double().split(64), strict=True)]
    )


def ratio(of: torch.Tensor, to: torch.Tensor) -> tuple[float, float]:
    """Return the ratio of two mean distances and its standard error, paired by prediction."""
    found = float(of.mean() / to.mean())
    return found, metrics.standard_error(of - found * to) / float(to.mean())


@torch.no_grad()
def judge(name: str, formats: list[str], unit_name: str) -> list[dict[str, Any]]:
    """Print and return the figures of one model."""
    subject = MODELS[name]()
    expected = subject.answer(subject.model)
    found: dict[str, torch.Tensor] = {}
    tokens = subject.text.tokens
    print(f"\n{name}: {len(expected):,} {'embeddings' if subject.are_states else 'predictions'}")
    print(f"calibration: {tokens[0]:,} tokens for statistics, {tokens[1]:,} to compare codes on; all for GPTQ")
    head = f"{'format':18} {'bits':>6} {'distance':>10} {'of ' + unit_name:>8}"
    print(f"{head} {'standard error':>14} {'top-1':>8} {'s':>5}")
    rows = []
    for f in dict.fromkeys([unit_name, *formats]):
        begin = time.perf_counter()
        try:
            model, bits = made(subject, f)
        except ValueError as e:
            if not f.startswith("plan"):
                raise
            print(f"{f}: NOT RUN ({e})")  # these layers need more bits
            continue
        got = subject.answer(model)
        same = float((expected.argmax(1) == got.argmax(1)).double().mean())
        found[f] = distance = distances(expected, got, subject.are_states)
        unit = found[unit_name]
        mean, error = float(distance.mean()), metrics.standard_error(distance)
        share, share_error = ratio(distance, unit)
        shown = "" if subject.are_states else f"{100 * same:.2f} %"
        took = time.perf_counter() - begin
        print(f"{f:18} {bits:6.2f} {mean:10.2e} {share:8.3f} {share_error:14.3f} {shown:>8} {took:5.0f}", flush=True)
        row = {"model": name, "format": f, "bits": bits, "distance": mean, "distance_error": error, "of_unit": share}
        rows.append({**row, "standard_error": share_error, "top_1": None if subject.are_states else same})
    for of, to, most in CLAIMS:
        if of in found and to in found:
            share, error = ratio(found[of], found[to])
            print(f"{of} / {to}: {share:.3f} ± {error:.3f}, at most {most}: {'yes' if share <= most else 'NO'}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--ladder", action="store_true", help="formats of 4 to 8 bits, ours and others, and plans")
    parser.add_argument("--unit", default="Q8_0", help="the format to compare with")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG file: distance over bits (needs matplotlib)")
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
    if arguments.plot:
        arguments.plot.write_text(ladder_picture.draw(results), encoding="utf-8")


if __name__ == "__main__":
    main()
