"""In-place conversion: linear layers to QINSLinear, embeddings to QINSEmbedding, experts to QINSExperts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..codec import EncodedArray, encode, fallback_note, format_of, resolve_group_size, warn_if_slow
from ..system import give_back_freed_memory, progress
from .choosing import Layer, check_finite, choose, choose_embeddings, choose_experts
from .comparing import WeightComparison
from .embedding import QINSEmbedding
from .experts import QINSExperts, format_of_experts
from .linear import QINSLinear
from .placing import place_codes
from .report import ConversionReport, ConvertedModule, SkippedModule

# Called with each converted model; keyed by who registered the call. The room `hf` lets transformers save such models.
after_conversion: dict[str, Callable[[nn.Module], None]] = {}


def convert(
    model: nn.Module,
    codec: str = "log8",
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = ("lm_head",),
    group_size: int | str | None = "default",
    embeddings: bool = False,
    show_progress: bool | None = None,
) -> ConversionReport:
    """Quantize a model in place: replace every module whose class is exactly nn.Linear, at any depth, by a QINSLinear.

    Experts that transformers 5 keeps as stacks of matrices become QINSExperts. On request, embeddings become
    QINSEmbedding.

    A module that appears in several places is converted once and stays shared. Modules that share one weight share its
    codes. Layers are converted one after another, and each one's floats are freed before the next, so peak memory is
    the float model plus the codes of one layer.

    Args:
        model: any nn.Module that contains linear layers.
        codec: "log8", "log6", "log5", "log4", "log9" or "golden". If in_features is not a multiple of 8, a matrix gets
            log8 instead of log6, log5 or log4, and the report says so.
        include: fnmatch patterns of module names to convert; None for all.
        exclude: patterns of module names to skip.
        group_size: inputs per group scale; "default" for 64 (log8) or 32 (log6, log5, log4); None for per-row scales
            only (log8).
        embeddings: convert embeddings too: the input embedding of a transformers model, all embeddings of others.
        show_progress: None shows a progress bar on a terminal (with rich installed).

    Returns:
        a report that prints as a table; it lists the skipped modules with reasons.

    Raises:
        ValueError: a weight is NaN or infinite, or sharded between ranks, or a skipped layer shares the weight of a
            converted embedding. The message names the module, and the model is unchanged.

    """
    resolve_group_size(codec, group_size, 1)  # raises before anything else is done
    sharded = next((n for n, p in model.named_parameters() if hasattr(p, "placements")), None)
    if sharded:
        raise ValueError(
            f"{sharded}: sharded between ranks, expected a whole weight; quantize while the model loads, with "
            "quantization_config=qins.QinsConfig()"
        )
    warn_if_slow(codec, group_size)
    report = ConversionReport()
    chosen: dict[Layer, str] = {m: n for m, n in choose(model, include, exclude, report).items()}
    if embeddings:  # first, so that what is tied to them shares their codes
        chosen = choose_embeddings(model, chosen, include, exclude, report) | chosen
    experts = choose_experts(model, include, exclude, report)
    check_finite(chosen, experts)
    _convert(chosen, places_of(model, chosen), codec, group_size, report, show_progress)
    for name, module in experts.items():
        model.set_submodule(name, encode_experts(name, module, codec, group_size, report))
    place_codes(model, from_file=False)
    give_back_freed_memory()
    tell_others(model)
    return report


def encode_experts(
    name: str, module: nn.Module, codec: str, group_size: int | str | None, report: ConversionReport
) -> QINSExperts:
    """Quantize a module of experts.

    Raises:
        ValueError: a weight is NaN or infinite.

    """
    codec, sizes, note = format_of_experts(module, codec, group_size)
    try:
        new = QINSExperts.from_experts(module, codec, sizes)
    except ValueError as e:
        raise ValueError(f"{name}.{e}") from None
    comparison = WeightComparison()
    for stack, shape in new.shapes.items():
        before: torch.Tensor = module._parameters[stack]  # type: ignore[assignment]
        matrices = before.transpose(1, 2) if new.is_transposed else before
        quality = comparison.stack_snr_db(matrices, lambda i, stack=stack: new.encoded(stack, i))  # type: ignore[misc]
        after = sum(f.nbytes for f in new.fields(stack))
        report.converted.append(
            ConvertedModule(f"{name}.{stack}", shape, codec, sizes[stack], before.nbytes, after, quality, note=note)
        )
    keep_hooks(module, new)
    return new


Places = dict[nn.Module, list[tuple[nn.Module, str]]]


def places_of(model: nn.Module, chosen: Iterable[nn.Module]) -> Places:
    """Return the places of each module: parents and keys."""
    places: Places = {m: [] for m in chosen}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child in places:
                places[child].append((parent, key))
    return places


def _convert(
    chosen: dict[Layer, str],
    places: Places,
    codec: str,
    group_size: int | str | None,
    report: ConversionReport,
    show_progress: bool | None,
) -> None:
    by_weight: dict[int, QINSLinear | QINSEmbedding] = {}
    comparison = WeightComparison()
    with progress(f"encoding to {codec}", sum(m.weight.numel() for m in chosen), show_progress) as advance:
        # each layer's floats are freed before the next layer is encoded, so nothing here may keep a reference
        while chosen:
            module = next(iter(chosen))
            name, count, key_of_weight = chosen.pop(module), module.weight.numel(), id(module.weight)
            same = by_weight.get(key_of_weight)
            if same is None:
                new = _encode_module(name, module, codec, group_size, report, comparison)
            else:
                new = sharing_codes(name, module, same, report)
            keep_hooks(module, new)
            if any(m.weight is module.weight for m in chosen):
                by_weight[key_of_weight] = new
            for parent, key in places.pop(module):
                parent._modules[key] = new
            del module, new, same
            advance(count)


def tell_others(model: nn.Module) -> None:
    """Call what other rooms and libraries registered in `after_conversion`."""
    for call in after_conversion.values():
        call(model)


def _encode_module(
    name: str,
    module: Layer,
    codec: str,
    group_size: int | str | None,
    report: ConversionReport,
    comparison: WeightComparison,
) -> QINSLinear | QINSEmbedding:
    weight = module.weight
    note = fallback_note(codec, weight.shape[1])
    codec, size = format_of(codec, group_size, weight.shape[1])
    quality = math.nan
    encoded = None
    if weight.device.type != "meta":
        encoded = encode(weight, codec, group_size=size)
        quality = comparison.snr_db(weight, encoded)
    new = _from_encoded(module, encoded, codec, size)
    after = sum(b.numel() * b.element_size() for b in new._buffers.values() if b is not None)
    before = weight.numel() * weight.element_size()
    report.converted.append(ConvertedModule(name, tuple(weight.shape), codec, size, before, after, quality, note=note))
    return new


def _from_encoded(
    module: Layer, encoded: EncodedArray | None, codec: str, size: int | None
) -> QINSLinear | QINSEmbedding:
    if isinstance(module, nn.Embedding):
        return QINSEmbedding.from_encoded(module, encoded, codec, size)
    return QINSLinear.from_encoded(module, encoded, codec, size)


def sharing_codes(
    name: str, module: Layer, same: QINSLinear | QINSEmbedding, report: ConversionReport
) -> QINSLinear | QINSEmbedding:
    """Return a quantized module that shares the codes of `same`, whose weight it shared."""
    new = _from_encoded(module, None, same.codec, same.group_size)
    new._buffers.update(same._buffers)
    if isinstance(same, QINSEmbedding):  # a tied pair is saved once
        new._non_persistent_buffers_set.update(new._names)
    kind = "Embedding" if isinstance(module, nn.Embedding) else "Linear"
    report.skipped.append(SkippedModule(name, kind, "shares the codes of a module with the same weight"))
    return new


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Copy the hooks of a module to its replacement."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(new, hooks).update(getattr(old, hooks))
