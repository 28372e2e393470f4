"""How transformers renames and merges a checkpoint's tensors while it loads and saves a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import transformers

_VERSION = int(transformers.__version__.partition(".")[0])


def with_and_without_prefix(model: Any, name: str) -> tuple[str, str, str]:
    """Return a name unchanged, with the base model's prefix and without it; models with a head add this prefix."""
    prefix = model.base_model_prefix + "." if model.base_model_prefix else ""
    return name, prefix + name, name.removeprefix(prefix)


def name_of(model: Any, module: Any) -> str:
    """Return the name of a module of the model."""
    name: str = next(n for n, m in model.named_modules() if m is module)
    return name


class Names:
    """The renamings and merges that transformers applies to tensors of this model's checkpoints."""

    def __init__(self, model: Any) -> None:
        self.model, self.state = model, model.state_dict()
        self.renamings: list[Any] = []
        self.converters: list[Any] = []
        self.used: list[Any] = []  # renamings that changed at least one key
        if _VERSION >= 5:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter

            for c in get_model_conversion_mapping(model):
                (self.converters if isinstance(c, WeightConverter) else self.renamings).append(c)

    def loaded(self, key: str) -> tuple[str, str | None]:
        """Return the model's name for a checkpoint key, and the pattern of the converter that handles it, if any."""
        if _VERSION >= 5:
            from transformers.core_model_loading import rename_source_key

            name, pattern = rename_source_key(
                key, self.renamings, self.converters, self.model.base_model_prefix, self.state
            )
            if name in self.state or pattern is not None:
                renamed = key
                for renaming in self.renamings:
                    before, renamed = renamed, renaming.rename_source_key(renamed)[0]
                    if renamed != before and renaming not in self.used:
                        self.used.append(renaming)
                return name, pattern
        else:
            for pattern, replacement in (getattr(self.model, "_checkpoint_conversion_mapping", None) or {}).items():
                key = re.sub(pattern, replacement, key)
        return next((n for n in with_and_without_prefix(self.model, key) if n in self.state), key), None

    def saved(self, name: str) -> str:
        """Return the name under which transformers saves a tensor of the model."""
        for renaming in reversed([r for r in self.renamings if r in self.used]):
            name = renaming.reverse_transform().rename_source_key(name)[0]
        return name


def guard(coded: Iterable[tuple[str, bool]]) -> str | None:
    """Return the name of the float parameter for which a quantized checkpoint has an empty tensor, the guard.

    If qins is not installed, transformers warns of an unknown quantization and continues with random weights. A tensor
    whose shape differs from the model's makes it stop instead. The guard belongs to a numbered layer if there is one,
    since models without a head have these layers too.

    Args:
        coded: name of each quantized module, and whether it is a stack of experts, which is itself a parameter.

    """
    ordered = sorted((is_stack, not any(p.isdecimal() for p in n.split(".")), n) for n, is_stack in coded)
    return next((n if is_stack else f"{n}.weight" for is_stack, _, n in ordered), None)


def saved_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names under which `save_pretrained` saves these tensors of a model."""
    if _VERSION >= 5:
        from transformers.core_model_loading import revert_weight_conversion

        tokens = {n: torch.empty(0) for n in names}
        by_token = {id(t): n for n, t in revert_weight_conversion(model, dict(tokens)).items()}
        return {n: by_token.get(id(t), n) for n, t in tokens.items()}
    # as save_pretrained of transformers 4 does
    mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    saved = {}
    for name in names:
        saved[name] = name
        for replacement, pattern in mapping.items():
            renamed, count = re.subn(pattern, re.sub(r"\(.*\)", "", replacement.lstrip("^")), name)
            if count:
                saved[name] = renamed
                break
    return saved


def some(names: list[str]) -> str:
    """Return the first five names as text, and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
