"""How transformers names and joins the tensors of a checkpoint while it loads and saves a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import transformers

_VERSION = int(transformers.__version__.partition(".")[0])


def with_and_without_prefix(model: Any, name: str) -> tuple[str, str, str]:
    """A name, and what it is in a checkpoint or a model that has a head where the other has none."""
    prefix = model.base_model_prefix + "." if model.base_model_prefix else ""
    return name, prefix + name, name.removeprefix(prefix)


def name_of(model: Any, module: Any) -> str:
    """The name of a module of the model."""
    name: str = next(n for n, m in model.named_modules() if m is module)
    return name


class Names:
    """How transformers names and joins the tensors of a checkpoint of this model, while loading and saving."""

    def __init__(self, model: Any) -> None:
        self.model, self.state = model, model.state_dict()
        self.renamings: list[Any] = []
        self.converters: list[Any] = []
        self.used: list[Any] = []  # renamings that some key needed
        if _VERSION >= 5:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter

            for c in get_model_conversion_mapping(model):
                (self.converters if isinstance(c, WeightConverter) else self.renamings).append(c)

    def loaded(self, key: str) -> tuple[str, str | None]:
        """The model's name for a key, and the pattern of the converter that takes it."""
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
        """The name under which transformers saves a tensor of the model."""
        for renaming in reversed([r for r in self.renamings if r in self.used]):
            name = renaming.reverse_transform().rename_source_key(name)[0]
        return name


def guard(coded: Iterable[tuple[str, bool]]) -> str | None:
    """The float parameter, by its name in the model, in whose place a checkpoint of codes has an empty tensor.

    Where qins is not installed, transformers warns of an unknown quantization and goes on with random weights. What
    stops it is a tensor that has not the shape of the model's. It is one of a layer, which models without a head have,
    too.

    Args:
        coded: names of modules in codes, and whether each is a stack of experts, which is a parameter itself.

    """
    ordered = sorted((is_stack, not any(p.isdecimal() for p in n.split(".")), n) for n, is_stack in coded)
    return next((n if is_stack else f"{n}.weight" for is_stack, _, n in ordered), None)


def saved_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The names under which `save_pretrained` saves a model's tensors."""
    if _VERSION >= 5:
        from transformers.core_model_loading import revert_weight_conversion

        tokens = {n: torch.empty(0) for n in names}
        by_token = {id(t): n for n, t in revert_weight_conversion(model, dict(tokens)).items()}
        return {n: by_token.get(id(t), n) for n, t in tokens.items()}
    # what save_pretrained of transformers 4 does
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
    """Name the first few, and say how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
