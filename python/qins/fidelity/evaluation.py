"""`qins eval`: one model against its float original, or every codec and peer against one float model."""

from __future__ import annotations

import gc
import hashlib
import math
import re
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .. import _core
from ..calibration import calibrate, cut, plan, split
from ..codec import LOG_BITS, is_packed, isa, snr_db
from ..files import inspect
from ..hf import QinsConfig, find_model, find_source, load_tokenizer, loading, require_transformers
from ..nn import Coded, ConversionReport, QINSLinear, choose, convert
from ..system import (
    cpu_name,
    give_back_freed_memory,
    peak_resident_bytes,
    progress,
    reset_peak_resident_bytes,
    write_json,
)
from . import metrics
from .metrics import Comparison, Similarity
from .peers import PEERS
from .recording import Recording, fingerprint, left_out, vocabulary
from .subjects import Item, Subject, subject

Tensor = torch.Tensor

# The rows of the full table, in order. "calibrated" is log8 with codes chosen on text that is not evaluated on.
CODECS = ("log8", "calibrated", "calibrated to 8.13 bits", "log8 per row", "log9", "golden", "rational")
# Rows that only --codec adds.
PACKED = (*filter(is_packed, LOG_BITS), *(f"calibrated {codec}" for codec in LOG_BITS if is_packed(codec)))
WHOLE_BF16 = "bf16 model"
_TO_BITS = re.compile(r"calibrated to (\d+(?:\.\d+)?) bits")

_PROMPTS = 4
_PROMPT_TOKENS = 32


@dataclass
class Settings:
    """What to evaluate on.

    Attributes:
        text: None for the text that ships with the package.
        tokens: number of tokens to evaluate on, from the beginning of the text.
        window: tokens per window.
        new_tokens: length of each greedy continuation.
        calibration: text to calibrate on; None for the part of `text` that is not evaluated on.
        calibration_tokens: maximum number of tokens to calibrate on.
        directory: where the reference's answers are stored; None for a temporary directory.
        show_progress: None shows a progress bar on a terminal.

    """

    text: str | None = None
    tokens: int = 2048
    window: int = 512
    new_tokens: int = 32
    calibration: str | None = None
    calibration_tokens: int = 8192
    directory: Path | None = None
    show_progress: bool | None = None


@dataclass
class Measured:
    """The figures of one model against its reference.

    Attributes:
        name: its name in tables.
        bits: bits per quantized weight, scales included; 16 or 32 for floats, nan if unknown.
        bytes: memory by kind of module; empty for peers, which are held as floats.
        comparison: comparison of predictions; None for encoders.
        similarity: comparison of hidden states; None for models that generate.
        greedy_same: for each continuation, the number of tokens before the first that differs from the reference.
        forced: share of the reference's greedy tokens that are also this model's most likely token, given the
            reference's tokens before them; None without continuations.
        tokens_per_second: speed of greedy decoding; None for peers and encoders.
        peak_bytes: peak memory of the process while this model ran; None where the system does not report it.
        layers: layer name to the SNR in dB of its weights (if known) and outputs.
        seconds: time to make the model from floats.

    """

    name: str
    bits: float
    bytes: dict[str, int]
    comparison: Comparison | None
    similarity: Similarity | None
    greedy_same: list[int]
    forced: float | None
    tokens_per_second: float | None
    peak_bytes: int | None
    layers: dict[str, dict[str, float]]
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON, without the values of single predictions."""
        d = {k: v for k, v in vars(self).items() if k not in ("comparison", "similarity")}
        if self.comparison is not None:
            d["fidelity"] = asdict(self.comparison.summary())
        if self.similarity is not None:
            d["similarity"] = self.similarity.summary()
        return d

    @property
    def distances(self) -> Tensor:
        """KL divergence of each prediction; for encoders, 1 - cosine of each token's state."""
        if self.comparison is not None:
            return self.comparison.kl
        assert self.similarity is not None
        return self.similarity.tokens


@dataclass
class Evaluation:
    """The result of `qins eval`.

    Attributes:
        about: model, machine, text.
        measured: models in the order of the table.
        items: the inputs of the models.
        levels: data for the histogram of weights: values over their scale, and the codes' levels.

    """

    about: dict[str, Any]
    measured: list[Measured] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    levels: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        return self.about | {"models": [m.to_dict() for m in self.measured]}


@dataclass
class Made:
    """A model to measure."""

    model: nn.Module
    bits: float
    snr: dict[str, float] = field(default_factory=dict)
    as_floats: bool = False


def bits_of(report: ConversionReport) -> float:
    """Return the mean bits per weight of the converted layers."""
    weights = sum(math.prod(m.shape) for m in report.converted)
    return 8 * report.bytes_after / weights


def _converted(model: nn.Module, report: ConversionReport) -> Made:
    if not report.converted:
        raise ValueError(f"expected linear layers to quantize, got none:\n{report}")
    return Made(model, bits_of(report), {m.name: m.snr_db for m in report.converted})


def as_peer(model: nn.Module, name: str) -> Made:
    """Give the layers of a float model the values that they have in one of PEERS, in place."""
    peer, snr = PEERS[name], {}
    bits = weights = 0.0
    for module, layer in choose(model, exclude=left_out(model)).items():
        w = module.weight.data
        decoded = peer.decoded(w.float())
        noise, signal = float((decoded - w).double().square().sum()), float(w.double().square().sum())
        snr[layer] = snr_db(signal, noise)
        bits += peer.bits(w.shape[1]) * w.numel()
        weights += w.numel()
        module.weight.data = decoded.to(w.dtype)
    return Made(model, bits / weights, snr, as_floats=True)


Compared = tuple[Comparison | None, Similarity | None]


class Windows(Protocol):
    """Answers windows of text elsewhere, on several machines; results are in the windows' order."""

    def record(self, recording: Recording, reference: str) -> None:
        """Record the reference's answers that are missing."""

    def compare(self, recording: Recording, path: str, name: str) -> list[Compared]:
        """Compare a saved model's answers with the reference's."""


def compare_window(subject: Subject, model: nn.Module, recording: Recording, i: int, name: str) -> Compared:
    """Compare a model's answer on window i with the reference's: predictions, hidden states, or both.

    Raises:
        ValueError: the hidden states differ in size.

    """
    item = recording.items[i]
    expected, got = recording.answer(i), subject.answer(model, item)
    predictions = states = None
    if expected.log_probabilities is not None and got.log_probabilities is not None:
        predictions = metrics.compare_predictions(expected.log_probabilities, got.log_probabilities, item.targets)
    if expected.states is not None and got.states is not None:
        if expected.states.shape != got.states.shape:
            raise ValueError(
                f"{name}: expected hidden states of {expected.states.shape[1]} values, as {recording.subject.name} "
                f"has, got {got.states.shape[1]}"
            )
        states = Similarity.of(expected.states, got.states)
    return predictions, states


class Bench:
    """Measures models one after another against a recording, with only one of them in memory at a time."""

    def __init__(self, reference: str, settings: Settings, windows: Windows | None = None) -> None:
        self.settings, self.windows = settings, windows
        self.reference = find_model(reference)
        self.subject = subject(self.reference)
        self.tokenizer = self.subject.tokenizer()
        text = metrics.sample_text() if settings.text is None else settings.text
        self.items, self.rest = self.subject.items(self.tokenizer, text, settings.tokens, settings.window)
        self._total = sum(i.text.numel() for i in self.items)
        self.evaluation = Evaluation(
            {
                "reference": self.reference, "kind": self.subject.kind,
                "cpu": cpu_name(), "isa": isa(), "threads": torch.get_num_threads(),
                "text": "shipped" if settings.text is None else "given",
                "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "predictions": sum(i.at.numel() for i in self.items),
                "window": max(i.arguments["input_ids"].numel() for i in self.items),
            },
            items=self.items,
        )  # fmt: skip

    def calibration_batches(self) -> list[Any]:
        """Return batches to calibrate on. None is evaluated on, unless the caller passed such a text."""
        s = self.settings
        ids = self.rest
        if s.calibration is not None:
            ids = torch.tensor(self.tokenizer(s.calibration, verbose=False).input_ids, dtype=torch.int64)
        return [self.subject.calibration(b) for b in cut(ids, s.calibration_tokens, self.evaluation.about["window"])]

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Yield the reference's answers, recorded now if they are missing."""
        s = self.settings
        with tempfile.TemporaryDirectory(prefix="qins-eval-") as temporary:
            directory = s.directory or Path(temporary)
            prompts = self.subject.prompts(self.items, _PROMPTS, _PROMPT_TOKENS, s.new_tokens)
            key = fingerprint(self.reference, self.items, prompts, s.new_tokens)
            r = Recording(directory, key, self.subject, self.items, prompts, s.new_tokens)
            if not r.complete:
                if self.windows is not None:
                    self.windows.record(r, self.reference)
                model = self._float()
                with progress("the float model", self._total, s.show_progress) as advance:
                    r.record(model, advance)
                self.evaluation.about["reference_bytes"] = metrics.bytes_by_component(model)
                del model
            self.evaluation.about["reference_tokens_per_second"] = r.reference()["tokens_per_second"]
            yield r

    def _float(self) -> Any:
        return self.subject.load(self.reference, dtype=torch.float32)

    def make(self, name: str) -> Made:
        """Make one of CODECS, PACKED, PEERS or WHOLE_BF16 from the float model."""
        model = self._float()
        left = left_out(model)
        if not choose(model, exclude=left):
            raise ValueError(
                f"{self.reference}: expected linear layers to quantize, got none; if `qins quantize` finds some "
                "(Conv1D), measure its output with --against"
            )
        if name in PEERS:
            return as_peer(model, name)
        if name == WHOLE_BF16:
            return Made(model.bfloat16(), 16.0)
        if name.startswith("calibrated"):
            text, show = split(self.calibration_batches()), self.settings.show_progress
            told = _TO_BITS.fullmatch(name)
            target = float(told[1]) if told else None
            spending = (
                None if target is None else plan(model, text, target_bits=target, exclude=left, show_progress=show)
            )
            last = name.rpartition(" ")[2]
            codec = last if last in LOG_BITS else "log8"
            report = calibrate(model, text, codec=codec, plan=spending, exclude=left, show_progress=show)
            self.evaluation.about["calibration"] = {
                "tokens": report.tokens, "held_out": report.held_out, "seconds_statistics": report.seconds_statistics,
                "seconds_rounding": report.seconds_rounding,
            }  # fmt: skip
            return _converted(model, report)
        if name == "log8":
            before = self._sample_of_weights(model, left)
        codec = "log8" if name == "log8 per row" else name
        size = None if name == "log8 per row" else "default"
        show = self.settings.show_progress
        made = _converted(model, convert(model, codec, group_size=size, exclude=left, show_progress=show))
        if name == "log8":
            self.evaluation.levels = _over_scale(model, *before)
        return made

    def _sample_of_weights(self, model: nn.Module, left: list[str]) -> tuple[str, Tensor]:
        chosen = choose(model, exclude=left)
        middle = list(chosen.items())[len(chosen) // 2]
        return middle[1], middle[0].weight.detach().float().clone()

    def load(self, path: str) -> Made:
        """Load a model to be measured as it is."""
        given = subject(path)
        if given.architecture is not self.subject.architecture:
            raise ValueError(
                f"{path}: expected {self.subject.architecture.__name__}, as {self.reference} is, "
                f"got {given.architecture.__name__}"
            )
        model = self.subject.load(path)
        layers = [m for m in model.modules() if isinstance(m, Coded) and not m._non_persistent_buffers_set]
        if layers:
            matrices = [found for m in layers for found in m.matrices("")]
            stored = sum(f.nbytes for *_, fields in matrices for f in fields)
            bits = 8 * stored / sum(math.prod(shape) for _, shape, *_ in matrices)
        else:
            bits = float(torch.finfo(model.dtype).bits)
        return Made(model, bits, _weight_snr(path, self.reference) if layers else {})

    def restored(self, path: str) -> Made:
        """Load the original that a checkpoint's `exact-*.safetensors` restore."""
        model = self.subject.load(path, dtype=torch.float32, quantization_config=QinsConfig(restore=True))
        found = inspect(find_source(path))
        return Made(model, found.bits_per_weight + found.restoring_bits_per_weight)

    def _check_vocabulary(self, name: str, model: Any, recording: Recording) -> None:
        expected, got = recording.reference()["vocabulary"], vocabulary(model)
        if got != expected:
            raise ValueError(f"{name}: expected a vocabulary of {expected}, as {self.reference} has, got {got}")

    def _compared(self, name: str, model: Any, recording: Recording) -> Iterator[Compared]:
        with progress(name, self._total, self.settings.show_progress) as advance:
            for i, item in enumerate(self.items):
                yield compare_window(self.subject, model, recording, i, name)
                advance(item.text.numel())

    def measure(self, name: str, make: Callable[[], Made], recording: Recording, path: str | None = None) -> Measured:
        """Make a model, measure it, and free it; `path`: where it is saved, if other machines can load it."""
        begin = time.perf_counter()
        made = make()
        seconds = time.perf_counter() - begin
        gc.collect()
        give_back_freed_memory()
        reset_peak_resident_bytes()
        model = made.model
        self._check_vocabulary(name, model, recording)
        compared = (
            list(self._compared(name, model, recording))
            if self.windows is None or path is None
            else self.windows.compare(recording, path, name)
        )
        predictions = [p for p, _ in compared if p is not None]
        states = [s for _, s in compared if s is not None]
        same, forced, speed = _greedy(model, recording)
        outputs = recording.output_snr(model)
        layers = {
            n: ({"weight_snr_db": made.snr[n]} if n in made.snr else {}) | {"output_snr_db": snr}
            for n, snr in outputs.items()
        }
        measured = Measured(
            name, made.bits, {} if made.as_floats else metrics.bytes_by_component(model),
            Comparison.join(predictions) if predictions else None, Similarity.join(states) if states else None, same,
            forced, None if made.as_floats else speed, peak_resident_bytes(), layers, seconds,
        )  # fmt: skip
        self.evaluation.measured.append(measured)
        return measured


def _greedy(model: Any, recording: Recording) -> tuple[list[int], float | None, float | None]:
    """Return tokens before each continuation's first difference, share of forced agreement, and tokens per second."""
    same, agreed, count, best = [], 0, 0, 0.0
    for prompt, answer in zip(recording.prompts, recording.reference()["answers"], strict=True):
        expected = torch.tensor(answer)
        tokens, speed = recording.subject.continued(model, prompt, len(answer))
        best = max(best, speed)
        different = (tokens != expected).nonzero()
        same.append(int(different[0, 0]) if len(different) else len(answer))
        likely = recording.subject.most_likely(model, prompt, expected)
        agreed += int((likely == expected).sum())
        count += len(answer)
    return (same, agreed / count, best) if count else ([], None, None)


def _weight_snr(path: str, reference: str) -> dict[str, float]:
    """Return the SNR of a saved model's layers against the reference's checkpoint; empty if that is not readable."""
    from ..files import inspect

    if not (Path(path).is_dir() and Path(reference).is_dir()):
        return {}
    try:
        return {e.name: e.snr_db for e in inspect(path, reference).errors}
    except ValueError:  # layers with other names or shapes, or transposed (Conv1D)
        return {}


def _over_scale(model: nn.Module, name: str, weight: Tensor) -> dict[str, Any]:
    """Return one layer's weights over the scales of their codes, as a histogram, and the levels of the codes."""
    layer = model.get_submodule(name)
    assert isinstance(layer, QINSLinear)
    e = layer.encoded
    scale = torch.from_numpy(e.fields["scale"].copy())[:, None]
    if e.group_size:
        multiplier = (torch.from_numpy(e.fields["group_scale"].copy()).float() + 1) / 256
        scale = (scale * multiplier).repeat_interleave(e.group_size, 1)[:, : weight.shape[1]]
    ratio = (weight / scale.clamp_min(1e-30)).clamp(-1.1, 1.1)
    mu = float(e.fields["mu"])
    levels = array("f", _core.levels("log8", (mu,))).tolist()
    counts = torch.histc(ratio, 220, -1.1, 1.1)
    return {"layer": name, "mu": mu, "levels": levels, "counts": counts.tolist(), "range": 1.1}


def kind_of(reference: str | None) -> str:
    """Return the kind of a float original, one of those in `subjects`."""
    return subject(find_model(reference)).kind


def default_names(peers: bool = True) -> list[str]:
    """Return the rows of the full table."""
    return [*CODECS] + ([*PEERS, WHOLE_BF16] if peers else [])


def evaluate_one(
    model: str, against: str, settings: Settings, restored: bool = False, windows: Windows | None = None
) -> Evaluation:
    """Measure a model, directory or hub name, against its float original.

    Args:
        model: directory or hub name.
        against: that of its original.
        settings: what to measure on.
        restored: also measure the original that the model's `exact-*.safetensors` restore; its distances are 0.
        windows: what answers the windows of text; None: this process.

    """
    bench = Bench(against, settings, windows)
    bench.evaluation.about["model"] = model
    with bench.recording() as recording:
        name = Path(model).name or model
        bench.measure(name, lambda: bench.load(model), recording, model)
        if restored:
            bench.measure(f"{name}, restored", lambda: bench.restored(model), recording)
    return bench.evaluation


def evaluate_all(reference: str | None, names: Sequence[str], settings: Settings) -> Evaluation:
    """Make models of the given names (of CODECS, PACKED, PEERS, WHOLE_BF16) from a float one, and measure each."""
    known = [*CODECS, *PACKED, *PEERS, WHOLE_BF16]
    for name in names:
        if name not in known and not _TO_BITS.fullmatch(name):
            raise ValueError(f"codec: expected one of {', '.join(known)}, got {name!r}")
    bench = Bench(find_model(reference), settings)
    with bench.recording() as recording:
        for name in names:
            bench.measure(name, lambda name=name: bench.make(name), recording)  # type: ignore[misc]
            _keep(bench, settings)
    return bench.evaluation


def harness_results(model: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Run tasks of EleutherAI's lm-eval on a model and return its results.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: it has no such task.

    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as e:
        raise ImportError("--task needs lm-eval: pip install lm-eval") from e
    with loading("the checkpoint of a causal language model", model):
        loaded = require_transformers().AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False).eval()
    try:
        found = lm_eval.simple_evaluate(HFLM(pretrained=loaded, tokenizer=load_tokenizer(model)), tasks=list(tasks))
    except KeyError as e:
        raise ValueError(f"task: expected names of lm-eval's tasks, got {', '.join(tasks)}") from e
    results: dict[str, Any] = found["results"]
    return results


def _keep(bench: Bench, settings: Settings) -> None:
    """Save the figures so far next to the recording."""
    if settings.directory is not None:
        write_json(settings.directory / "measured.json", bench.evaluation.to_dict())
