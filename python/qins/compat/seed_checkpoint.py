"""Checkpoints saved by the prototype (the seed)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..codec import ARRAYS, SCALARS, EncodedArray
from ..files import encoded_layers, load_layer, open_checkpoint
from ..nn import QINSLinear


def load_seed_checkpoint(model: nn.Module, file: str | Path) -> list[str]:
    """Load a checkpoint of the project's prototype (the seed) into a model of the same architecture.

    The file holds `<layer>.stored`, `.sign`, `.log_min` and `.log_max` for quantized layers, and ordinary tensors. Each
    quantized layer replaces the model's nn.Linear by a QINSLinear with these codes. Everything else is copied.

    Args:
        model: the model to fill.
        file: the checkpoint.

    Returns:
        the names of the quantized layers.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged or does not fit the model, which is then unchanged.

    """
    checkpoint = open_checkpoint(file)
    problems: list[str] = []
    layers = encoded_layers(checkpoint, problems)
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    if not any(layer.codec == "golden" for layer in layers):
        raise ValueError(f"{file}: expected layers of stored, sign, log_min and log_max, got none")
    modules = dict(model.named_modules())
    new: dict[str, QINSLinear] = {}
    for layer in layers:
        module = modules.get(layer.name)
        if not isinstance(module, nn.Linear):
            what = "no such module" if module is None else type(module).__name__
            raise ValueError(f"{file}: {layer.name}: expected an nn.Linear of the model, got {what}")
        if layer.shape != (module.out_features, module.in_features):
            want = (module.out_features, module.in_features)
            raise ValueError(f"{file}: {layer.name}: expected codes of shape {want}, got {layer.shape}")
        (encoded,) = load_layer(checkpoint, layer)
        kept = {n: np.array(f) for n, f in encoded.fields.items()}
        encoded = EncodedArray(layer.codec, layer.shape, kept, layer.group_size)
        new[layer.name] = QINSLinear.from_encoded(module, encoded, layer.codec, layer.group_size)
    coded = {key for layer in layers for key in layer.fields.values()}
    guards = {f"{name}.weight" for name in new}  # empty, see hf.names.guard
    rest = {
        key: checkpoint.load(key) for key, t in checkpoint.tensors.items()
        if key not in coded and (t.elements or key not in guards)
    }  # fmt: skip
    _check_rest(model, rest, new, file)
    for name, module in new.items():
        parent, _, key = name.rpartition(".")
        modules[parent]._modules[key] = module
    model.load_state_dict(rest, strict=False)
    return list(new)


def _check_rest(model: nn.Module, rest: dict[str, torch.Tensor], new: dict[str, QINSLinear], file: str | Path) -> None:
    """Raise a ValueError unless the file's float tensors are exactly those that the model still needs."""
    own = model.state_dict()
    coded = {f"{name}.{n}" for name in new for n in ("weight", *ARRAYS["golden"], *SCALARS["golden"])}
    present = {t.data_ptr() for k, t in own.items() if k in rest}
    missing = [k for k, t in own.items() if k not in rest and k not in coded and t.data_ptr() not in present]
    unexpected = [k for k in rest if k not in own]
    wrong = [
        f"{k}: shape {tuple(rest[k].shape)} for {tuple(own[k].shape)}"
        for k in rest
        if k in own and rest[k].shape != own[k].shape
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("mismatched", wrong)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{file}: does not fit the model: {what} {', '.join(names[:5])}{more}")
