"""Selection of the layers of transformers' models to quantize."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..nn import (
    ConversionReport,
    SkippedModule,
    other_matrices,
    projections,
)
from .config import QinsConfig
from .embeddings import tied_output
from .modules import (
    conv1d,
)

# Routers of experts are small and decide where every token goes; in transformers 4 they are linear layers.
_ROUTERS = ("*.gate", "*.router", "*.shared_expert_gate")


def chosen_layers(model: Any, config: QinsConfig, report: ConversionReport) -> dict[str, nn.Module]:
    """Return the linear layers and experts to quantize, by name; the others go to the report.

    Embeddings, and an output embedding tied to one, are quantized later, once everything is loaded.

    Raises:
        ValueError: there is no layer to quantize.

    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    later = tied_output(model) if config.lm_head else None
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name == later or not (isinstance(module, (nn.Linear, conv1d())) or projections(module)):
            if other_matrices(module):
                report.skipped.append(SkippedModule(name, type(module).__name__, other_matrices(module)))
            continue
        reason = _reason_to_skip(config, name, module, output)
        if reason is None:
            found[name] = module
        else:
            report.skipped.append(SkippedModule(name, type(module).__name__, reason))
    if not found:
        raise ValueError(f"QinsConfig: no linear layer of {type(model).__name__} is selected for quantization")
    return found


def _reason_to_skip(config: QinsConfig, name: str, module: nn.Module, output: nn.Module | None) -> str | None:
    if module is output and not config.lm_head:
        return "the output embedding"
    if type(module) not in (nn.Linear, conv1d()) and not projections(module):
        return "a subclass, which may compute something else"
    if any(name == n or name.endswith("." + n) or name.startswith(n + ".") for n in config.modules_to_not_convert):
        return "in modules_to_not_convert"
    if any(fnmatchcase(name, p) for p in config.exclude):
        return "excluded"
    if config.include is not None and not any(fnmatchcase(name, p) for p in config.include):
        return "not included"
    if any(fnmatchcase(name, p) for p in _ROUTERS):
        return "a router"
    return None
