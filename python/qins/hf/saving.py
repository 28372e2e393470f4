"""Saving codes through transformers: names, checksums, the model card."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers

from ..files import checksum
from ..nn import QINSExperts
from ..system import upward
from .card import UploadWithCard, holds_codes
from .config import QinsConfig
from .modules import coded_modules
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


def prepare_saving(model: Any, original: Path | None = None) -> None:
    """Make the model save codes under their own names and upload them with a card that says how to load them.

    Args:
        model: a loaded model with codes.
        original: directory of the floats that the saved files are to restore bit for bit; None for none.

    """
    model._upload_modified_files = UploadWithCard(str(model.config._name_or_path or ""), original)
    _keep_names_on_saving(model)
    if original is not None:
        model._qins_original = original
        model.save_pretrained = MethodType(_save_with_original, model)


def _save_with_original(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save a model as its class does, then what restores its original; transformers has no hook after saving."""
    out, save = Path(save_directory), type(model).save_pretrained
    if out.exists() and out.samefile(model._qins_original):
        raise ValueError(f"{out}: holds the original, which saving codes would overwrite; give another directory")
    given = signature(save).bind(model, save_directory, *args, **kwargs).arguments
    save(model, save_directory, *args, **kwargs)
    uploaded = given.get("push_to_hub", False)  # by UploadWithCard, which has written them
    if given.get("is_main_process", True) and not uploaded and holds_codes(out):
        upward["record_original"](model._qins_original, out)


def original_of(files: Any, quantized: bool) -> Path:
    """Return the directory of the floats that a model is loaded from.

    Raises:
        ValueError: it is loaded from codes, or not from files.

    """
    directories = {Path(f).parent for f in files or ()}
    if quantized or len(directories) != 1:
        got = "codes" if quantized else "none"
        raise ValueError(f"exact: expected a model that is loaded from files of floats, got {got}")
    return directories.pop()


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
