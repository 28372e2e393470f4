"""Calibrating what transformers loads: models in memory, and checkpoints on their way to the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .activations import Layer, Text, cut, split
from .calibration import Choice, Clock, Store, choose_codes
from .conversion import progress
from .linear import QINSLinear
from .models import load_tokenizer

if TYPE_CHECKING:
    from .hf import QinsHfQuantizer


def calibration_text(path: str) -> str:
    """Read a text file."""
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"calibration: expected a text file in UTF-8, got {path}: {e}") from None


def tokenized(source: str | Path, text: str, tokens: int) -> Text:
    """Cut a text into calibration data with the tokenizer of a model.

    Raises:
        ValueError: it is too short or too uniform.

    """
    ids: torch.Tensor = load_tokenizer(str(source))(text, return_tensors="pt", verbose=False).input_ids
    return split(cut(ids, tokens))


def record_of(text: Text, source: str) -> dict[str, Any]:
    """What a checkpoint says of its calibration."""
    tokens, held_out = text.tokens
    return {"tokens": tokens, "held_out": held_out, "text_sha256": hashlib.sha256(source.encode()).hexdigest()}


def calibrate_loaded(quantizer: QinsHfQuantizer, model: Any) -> None:
    """Replace the modules of a float model that has just been loaded by calibrated ones."""
    from .hf import conv1d, sizes

    config = quantizer.quantization_config
    assert isinstance(config.calibration, str)
    source = calibration_text(config.calibration)
    text = tokenized(model.config._name_or_path, source, config.calibration_tokens)
    layers: dict[str, Layer] = {}
    for name, module in quantizer.chosen(model).items():
        codec, size = config.layer(name, sizes(module)[0])
        layers[name] = Layer(module, codec, size, isinstance(module, conv1d()))
    total = sum(layer.weight.numel() for layer in layers.values())
    made: dict[str, Choice] = {}
    with progress("calibrating", total, None) as advance:
        for name, choice in choose_codes(model, layers, text, mapped=True, advance=advance):
            made[name] = choice
    for name, choice in made.items():
        quantizer.put(model, name, layers[name].module, coded(layers[name], choice))
    config.calibration = record_of(text, source)


def coded(layer: Layer, choice: Choice) -> QINSLinear:
    """Return the QINSLinear that takes a layer's place; its buffers count as loaded."""
    weight, bias = layer.weight, layer.module.bias
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    new = QINSLinear.from_encoded(linear, choice.encoded, layer.codec, layer.group_size)
    for name in choice.encoded.fields:
        new._buffers[name] = torch.from_numpy(choice.encoded.fields[name])
        new._buffers[name]._is_hf_initialized = True  # type: ignore[union-attr]
    new.bias = bias  # type: ignore[assignment]
    new.train(layer.module.training)
    return new


def calibrate_checkpoint(
    source: Path,
    architecture: type[Any],
    modules: Mapping[str, tuple[str, int | None, bool]],
    text: Text,
    store: Store,
    show_progress: bool | None,
) -> Clock:
    """Put the codes of a checkpoint's modules into `store`; its floats stay mapped files.

    Args:
        source: directory of the checkpoint.
        architecture: transformers' class of the model.
        modules: name to (codec, group_size, transposed).
        text: what to calibrate on.
        store: where the codes go; those that are there already are not made again.
        show_progress: None shows a bar on a terminal.

    """
    model = architecture.from_pretrained(source, dtype="auto").eval()
    layers = {n: Layer(model.get_submodule(n), *about) for n, about in modules.items()}
    total, clock = sum(layer.weight.numel() for layer in layers.values()), Clock()
    with progress("calibrating", total, show_progress) as advance:
        for name, choice in choose_codes(model, layers, text, mapped=True, store=store, advance=advance, clock=clock):
            if layers[name].codec != "log8":
                store.put(name, choice)
    return clock
