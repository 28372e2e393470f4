"""Preparing a model for its checkpoint, which holds floats to quantize, or codes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ..codec import FIELD_ROLES
from ..files import open_checkpoint, verify
from ..nn import (
    ConversionReport,
    QINSExperts,
    projections,
)
from .choosing import chosen_layers
from .config import QinsConfig
from .embeddings import share_codes
from .modules import (
    PendingExperts,
    PendingLinear,
    coded_modules,
    conv1d,
    empty_module,
    experts_codec,
    put,
    sizes,
)
from .names import some, with_and_without_prefix
from .saving import guard_of


def expect_floats(model: Any, config: QinsConfig, report: ConversionReport) -> None:
    """Replace the modules to quantize with pending ones, which encode their weights as they are loaded."""
    for name, module in chosen_layers(model, config, report).items():
        if projections(module):
            put(model, name, module, PendingExperts(module, *experts_codec(config, name, module)))
            continue
        codec, size = config.layer(name, sizes(module)[0])
        new = empty_module(module, codec, size, PendingLinear)
        assert isinstance(new, PendingLinear)
        new.transposed = not isinstance(module, nn.Linear)
        new._parameters["weight"] = nn.Parameter(
            module.get_parameter("weight").detach().to("meta"), requires_grad=False
        )
        put(model, name, module, new)


def expect_codes(model: Any, config: QinsConfig) -> dict[str, str]:
    """Replace the modules for which the checkpoint has codes.

    Returns:
        name of each module that shares another one's codes, to the name of that one.

    Raises:
        ValueError: the checkpoint's list of modules does not fit the model.

    """
    modules = config.modules
    if modules is None:
        raise ValueError("quantization_config: expected the list of quantized modules of a saved checkpoint")
    fields = {name.rpartition(".")[2] for name in config.checksums or ()}
    if not modules and fields & set(FIELD_ROLES):
        raise ValueError("modules: expected the modules for which the checkpoint has codes, got none")
    left = set(modules)
    shared: dict[str, str] = {}

    def entry(name: str) -> list[Any] | None:
        known = next((n for n in with_and_without_prefix(model, name) if n in modules), None)
        left.discard(known or "")
        return modules[known] if known else None

    for name, module in list(model.named_modules()):
        stacks = {stack: entry(f"{name}.{stack}") for stack in projections(module)}
        if stacks and None not in stacks.values():
            about: dict[str, list[Any]] = stacks  # type: ignore[assignment]
            codec = next(iter(about.values()))[0]
            put(model, name, module, QINSExperts(module, codec, {s: a[1] for s, a in about.items()}))
            continue
        told = entry(name)
        if told is None or not isinstance(module, (nn.Linear, conv1d(), nn.Embedding)):
            continue
        try:
            new = empty_module(module, *told[:2])
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        put(model, name, module, new)
        if len(told) > 2:
            shared[name] = told[2]
    experts = sorted(n for n in left if ".experts." in n)
    if experts:
        raise ValueError(
            f"the checkpoint has codes of {some(experts)}, which {type(model).__name__} lacks in transformers "
            f"{transformers.__version__}: versions 4 and 5 keep experts in different modules; quantize the float "
            "model again with this version"
        )
    sharing = share_codes(model, shared)
    if guarded := guard_of(model):
        ignored = [re.escape(n) + "$" for n in with_and_without_prefix(model, guarded)]
        known = model._keys_to_ignore_on_load_unexpected  # its type depends on the version of transformers
        ignored += known or ()
        model._keys_to_ignore_on_load_unexpected = set(ignored) if isinstance(known, set) else ignored
    found = len(modules) - len(left)
    # transformers 5.0 casts every tensor of the modules that a model keeps in float32, their codes included.
    coded = {part for n, _ in coded_modules(model) for part in n.split(".")}
    plan = getattr(model, "dtype_plan", None)
    if plan:
        model.dtype_plan = {k: v for k, v in plan.items() if k not in coded}
    if modules and not found:
        first = next(iter(modules))
        raise ValueError(f"{type(model).__name__} has none of the checkpoint's quantized modules, such as {first}")
    return sharing


def bytes_to_load(model: Any, shared: Iterable[str] = ()) -> int:
    """Return the bytes that loading a prepared model allocates.

    Args:
        model: as `expect_floats` or `expect_codes` left it. Weights to quantize count as codes.
        shared: modules that share the codes of others.

    """
    text = model.config.get_text_config()
    tied = set(model._tied_weights_keys or ()) if getattr(text, "tie_word_embeddings", False) else set()
    counted: dict[int, int] = {}
    for name, module in model.named_modules():
        if name in shared:
            continue
        floats = {} if isinstance(module, (PendingLinear, PendingExperts)) else module._parameters
        for field, tensor in (*floats.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta and f"{name}.{field}" not in tied:
                counted[id(tensor)] = tensor.nbytes
    return sum(counted.values())


def verify_files(config: QinsConfig, files: Iterable[str | Path] | None) -> None:
    """Raise a ValueError unless the files' tensors match the checksums in config.json."""
    checksums = config.checksums
    if not checksums:
        raise ValueError("verify: expected checksums in config.json, got none; an early qins wrote it")
    if not files:
        raise ValueError("verify: expected a checkpoint in files, got none: only files have checksums")
    problems: list[str] = []
    for file in files:
        problems += verify(open_checkpoint(file), checksums)[1]
    if problems:
        raise ValueError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else ""))
