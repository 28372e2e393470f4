"""Calibration of transformers' models, in memory and while a checkpoint is quantized on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibration import Choice, Layer, Rounding, Store, Text, choose_codes, cut, plan_layers, split
from ..codec import LOG_BITS
from ..nn import ConversionReport, QINSExperts, QINSLinear, projections
from ..system import progress, read_json, read_text, write_json
from .choosing import chosen_layers
from .config import QinsConfig
from .embeddings import loaded
from .models import load_tokenizer
from .modules import conv1d, experts_codec, put, sizes
from .released import load_floats


def tokenized(source: str | Path, text: str, tokens: int) -> Text:
    """Tokenize a text with a model's tokenizer and cut it into calibration data.

    Raises:
        ValueError: the text is too short or too uniform, or the tokenizer makes no tokens of it.

    """
    ids: torch.Tensor = load_tokenizer(str(source))(text, return_tensors="pt", verbose=False).input_ids
    if text and ids.numel() == 0:
        raise ValueError(f"{source}: expected a tokenizer that makes tokens of the calibration's text, got none")
    return split(cut(ids, tokens))


@dataclass(frozen=True)
class Calibration:
    """How to calibrate a checkpoint.

    Attributes:
        text: sample of what the model will read.
        tokens: maximum number of tokens of it to use.
        target_bits, target_kld: target of `qins.plan`; at most one of them.

    """

    text: str
    tokens: int = 8192
    target_bits: float | None = None
    target_kld: float | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError if both targets are given."""
        if self.target_bits is not None and self.target_kld is not None:
            raise ValueError("calibration: expected at most one of target_bits and target_kld, got both")

    @property
    def has_target(self) -> bool:
        """Whether to plan codecs and group sizes."""
        return self.target_bits is not None or self.target_kld is not None

    def record(self, text: Text) -> dict[str, Any]:
        """Return the record of the calibration that a checkpoint stores."""
        tokens, held_out = text.tokens
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        targets = {"target_bits": self.target_bits, "target_kld": self.target_kld} if self.has_target else {}
        return {"tokens": tokens, "held_out": held_out, "text_sha256": digest} | targets


def calibrate_loaded(model: Any, config: QinsConfig, report: ConversionReport) -> None:
    """Replace modules of a freshly loaded float model with calibrated ones."""
    assert isinstance(config.calibration, str)
    source = read_text(config.calibration)
    text = tokenized(model.config._name_or_path, source, config.calibration_tokens)
    layers: dict[str, Layer] = {}
    chosen = chosen_layers(model, config, report)
    # too few tokens reach each expert for statistics, so experts get the nearest codes
    experts = {n: m for n, m in chosen.items() if projections(m)}
    for name, module in chosen.items():
        if name not in experts:
            codec, size = config.layer(name, sizes(module)[0])
            layers[name] = Layer(module, codec, size, isinstance(module, conv1d()))
    total = sum(layer.weight.numel() for layer in layers.values())
    with progress("calibrating", total, None) as advance:
        made = dict(choose_codes(model, layers, text, mapped=True, advance=advance))
    for name, choice in made.items():
        put(model, name, layers[name].module, coded(layers[name], choice))
    for name, module in experts.items():
        new = QINSExperts.from_experts(module, *experts_codec(config, name, module))
        put(model, name, module, loaded(new))
    config.calibration = Calibration(source, config.calibration_tokens).record(text)


def coded(layer: Layer, choice: Choice) -> QINSLinear:
    """Return the QINSLinear that replaces a layer; its buffers are marked as loaded."""
    out_features, in_features = layer.weight.shape
    new = QINSLinear(
        in_features, out_features, bias=False, codec=layer.codec, group_size=layer.group_size, device="meta",
        dtype=layer.weight.dtype,
    )  # fmt: skip
    new._take_codes(choice.encoded, "cpu")
    new.register_parameter("bias", layer.module._parameters["bias"])
    new.train(layer.module.training)
    return loaded(new)


class CheckpointCalibration:
    """Calibration of a checkpoint's modules; their codes go to a store.

    The float weights stay memory-mapped. Those of an 8-bit or 4-bit checkpoint are decoded into memory, in the model's
    dtype.

    Args:
        source: directory of the checkpoint.
        architecture: transformers' class of the model.
        text: calibration data.
        store: where the codes go; codes already there are not computed again.
        show_progress: whether to show a progress bar; None shows it on a terminal.

    """

    def __init__(
        self, source: Path, architecture: type[Any], text: Text, store: Store, show_progress: bool | None
    ) -> None:
        self.text, self.store, self.show_progress = text, store, show_progress
        self.model = load_floats(architecture, source, dtype="auto").eval()

    def _layers(self, modules: Mapping[str, tuple[str, int | None, bool]]) -> dict[str, Layer]:
        return {n: Layer(self.model.get_submodule(n), *about) for n, about in modules.items()}

    def plan(
        self, modules: Mapping[str, tuple[str, int | None, bool]], calibration: Calibration, config: QinsConfig
    ) -> str:
        """Choose codecs and group sizes, or read the store's plan; make them overrides of the config.

        Returns:
            the plan as text.

        """
        path = self.store.directory / "plan.json"
        if not path.exists():
            layers = {n: layer for n, layer in self._layers(modules).items() if layer.codec in LOG_BITS}
            total = sum(layer.weight.numel() for layer in layers.values())
            with progress("planning", total, self.show_progress) as advance:
                made = plan_layers(
                    self.model, layers, self.text, calibration.target_bits, calibration.target_kld, mapped=True,
                    advance=advance,
                )  # fmt: skip
            estimate = "estimated_kld" if made.measure == "KL divergence" else "estimated_cosine_distance"
            plan = {"formats": made.formats, "left": made.left, "words": str(made), "bits": made.bits,
                     "estimate": {estimate: made.kld}}  # fmt: skip
            write_json(path, plan)
        about = read_json(path)
        formats = about["formats"].items()
        config.overrides = {n: {"codec": codec, "group_size": s} for n, (codec, s) in formats} | config.overrides
        config.exclude = [*config.exclude, *about["left"]]
        assert isinstance(config.calibration, dict)
        config.calibration |= {"bits": about["bits"]} | about["estimate"]
        words: str = about["words"]
        return words

    def encode(self, modules: Mapping[str, tuple[str, int | None, bool]], rounding: Rounding | None = None) -> None:
        """Choose the codes of these modules, given as name to (codec, group_size, transposed)."""
        layers = self._layers(modules)
        total = sum(layer.weight.numel() for layer in layers.values())
        with progress("calibrating", total, self.show_progress) as advance:
            for _ in choose_codes(
                self.model, layers, self.text, mapped=True, store=self.store, advance=advance, rounding=rounding
            ):
                pass
