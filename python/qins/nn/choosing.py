"""Selection of the modules to quantize, with a reason for each one that is not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..codec import encode
from .affine_form import affine
from .embedding import QINSEmbedding
from .experts import QINSExperts, projections
from .linear import QINSLinear
from .report import ConversionReport, SkippedModule


def patterns_of(argument: str, patterns: str | Iterable[str] | None) -> list[str]:
    """Return an argument's patterns as a list."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns or [])
    if not all(isinstance(p, str) for p in listed):
        raise TypeError(f"{argument}: expected patterns (strings), got {patterns!r}")
    return listed


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def _not_asked_for(name: str, include: list[str], exclude: list[str]) -> str | None:
    if _matches(name, exclude):
        return "excluded"
    if include and not _matches(name, include):
        return "not included"
    return None


def _reason_to_skip(name: str, module: nn.Linear, include: list[str], exclude: list[str]) -> str | None:
    reason = _not_asked_for(name, include, exclude)
    if reason is not None:
        return reason
    if type(module) is not nn.Linear:
        return "a subclass of nn.Linear, which may compute something else"
    if "weight" not in module._parameters:
        return "its weight is not a parameter (something computes it)"
    if not module.weight.dtype.is_floating_point or module.weight.element_size() == 1:
        return f"its weight is {module.weight.dtype}"
    return None


def other_matrices(module: nn.Module) -> str:
    """Return why a module with a matrix as its weight is skipped if it is not a linear layer; empty for others."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    utils = sys.modules.get("transformers.pytorch_utils")
    if utils is not None and isinstance(module, utils.Conv1D):
        return "a linear layer with a transposed weight, which QinsConfig and qins quantize accept"
    return ""


def choose(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = ("lm_head",),
    report: ConversionReport | None = None,
) -> dict[nn.Linear, str]:
    """Return the layers to convert and their names; the others go to the report, if there is one."""
    includes, excludes = patterns_of("include", include), patterns_of("exclude", exclude)
    chosen: dict[nn.Linear, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module, QINSLinear):
            other = other_matrices(module)
            if other and report is not None:
                report.skipped.append(SkippedModule(name, type(module).__name__, other))
            continue
        reason = "the model itself; wrap it" if module is model else _reason_to_skip(name, module, includes, excludes)
        if reason is None:
            chosen[module] = name
        elif report is not None:
            report.skipped.append(SkippedModule(name, type(module).__name__, reason))
    return chosen


def choose_embeddings(
    model: nn.Module,
    chosen: Mapping[Layer, str],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str],
    report: ConversionReport,
) -> dict[Layer, str]:
    """Return the embeddings to convert and their names, given the chosen layers.

    Raises:
        ValueError: a layer that is not chosen shares the weight of an embedding that is.

    """
    includes, excludes = patterns_of("include", include), patterns_of("exclude", exclude)
    given = getattr(model, "get_input_embeddings", None)
    source = given() if callable(given) else None
    found: dict[Layer, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or isinstance(module, QINSEmbedding):
            continue
        if source is not None and module.weight is not source.weight:
            continue
        reason = "the model itself; wrap it" if module is model else _not_asked_for(name, includes, excludes)
        if reason is None and module.max_norm is not None:
            reason = "it has max_norm, which changes weights"
        try:
            affine(module)
        except ValueError as e:
            reason = reason or str(e)
        if reason is None:
            found[module] = name
        else:
            report.skipped.append(SkippedModule(name, type(module).__name__, reason))
    names = {id(m.weight): n for m, n in found.items()}
    for name, module in model.named_modules():
        tied = names.get(id(module._parameters.get("weight")))
        if tied is not None and module not in found and module not in chosen:
            raise ValueError(
                f"embeddings: {name} shares the weight of {tied}, and would keep the floats; convert it too"
            )
    return found


def choose_experts(
    model: nn.Module, include: str | Iterable[str] | None, exclude: str | Iterable[str], report: ConversionReport
) -> dict[str, nn.Module]:
    """Return the modules of experts to convert, by name; the others go to the report."""
    includes, excludes = patterns_of("include", include), patterns_of("exclude", exclude)
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not projections(module) or isinstance(module, QINSExperts):
            continue
        reason = "the model itself; wrap it" if module is model else _not_asked_for(name, includes, excludes)
        if reason is None:
            chosen[name] = module
        else:
            report.skipped.append(SkippedModule(name, type(module).__name__, reason))
    return chosen


Layer = nn.Linear | nn.Embedding


def check_finite(
    chosen: Mapping[nn.Linear, str] | Mapping[Layer, str], experts: Mapping[str, nn.Module] | None = None
) -> None:
    """Raise a ValueError for the first module with a NaN or an infinity, before any module is changed."""
    weights = [(name, module.weight.detach()) for module, name in chosen.items()]
    for name, stacked in (experts or {}).items():
        weights += [(f"{name}.{s}", stacked._parameters[s].detach()) for s in projections(stacked)]  # type: ignore[union-attr]
    for name, weight in weights:
        if weight.device.type == "meta" or weight.numel() == 0:
            continue
        # float64 values may overflow float32, in which they are encoded
        if all(bool(torch.isfinite(end.float())) for end in torch.aminmax(weight)):
            continue
        try:
            encode(weight, "golden")
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
