"""Saving codes through transformers: names, checksums, the model card."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from ..files import checksum
from ..nn import (
    QINSExperts,
)
from .card import UploadWithCard
from .config import QinsConfig
from .modules import (
    coded_modules,
)
from .names import guard, saved_names
from .parallel import is_parallel, whole_state

_VERSION = int(transformers.__version__.partition(".")[0])


def guard_of(model: Any) -> str | None:
    """Return the `guard` of a model with codes."""
    layers = ((n, m) for n, m in coded_modules(model) if not m._non_persistent_buffers_set)
    return guard((part, isinstance(m, QINSExperts)) for n, m in layers for part, *_ in m.matrices(n))


def _keep_names_on_saving(model: Any) -> None:
    """Drop conversions that would mistake codes for the weights that they split or merge."""
    if _VERSION < 5:
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # a model that was not loaded is saved with the conversions of its class
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if type(c).__name__ != "PrefixChange"]
    model._weight_conversions = [c for c in conversions if not isinstance(c, WeightConverter)]


def prepare_saving(model: Any) -> None:
    """Make the model save codes under their own names and upload them with a card that says how to load them."""
    model._upload_modified_files = UploadWithCard(str(model.config._name_or_path or ""))
    _keep_names_on_saving(model)


def state_to_save(model: Any, config: QinsConfig) -> dict[str, torch.Tensor]:
    """Return the state to save, the codes and the guard; record its checksums in the config.

    Of several ranks, the first one saves the whole state; the others return nothing.
    """
    state: dict[tuple[int, Any], tuple[str, torch.Tensor]] = {}
    saved: dict[str, torch.Tensor] | None = whole_state(model) if is_parallel(model) else model.state_dict()
    if saved is None:
        return {}
    if guarded := guard_of(model):
        saved[guarded] = torch.empty(0, dtype=torch.uint8)
    for name, tensor in saved.items():  # of tensors that share memory, only the first is saved
        key = (tensor.data_ptr(), tensor.shape) if tensor.numel() else (id(tensor), name)
        state.setdefault(key, (name, tensor))
    names = saved_names(model, (name for name, _ in state.values()))
    config.checksums = dict(sorted((names[n], checksum(t)) for n, t in state.values()))
    return saved
