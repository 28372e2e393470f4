"""Registers with transformers and PEFT as soon as they are there, without importing them for those who do not use them.

transformers has no entry point for quantizers: where none is registered for a checkpoint's quant_method it warns, and
goes on with random weights. So `import qins`, before or after transformers, must be enough.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# A module of theirs, and the one of ours that is to be imported after it.
_AFTER = {"transformers.quantizers.auto": "qins.hf", "peft.tuners.lora.config": "qins._peft"}


class _Loader(importlib.abc.Loader):
    """Another loader, and then our registration."""

    def __init__(self, loader: importlib.abc.Loader, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(self.ours)


class _Finder(importlib.abc.MetaPathFinder):
    """Steps in for one module, once."""

    def __init__(self, theirs: str) -> None:
        self.theirs = theirs

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _AFTER[name])
        return spec


def install() -> None:
    """Register now where their module is loaded, else when it is."""
    waiting = {f.theirs for f in sys.meta_path if isinstance(f, _Finder)}
    for theirs, ours in _AFTER.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
        elif theirs not in waiting:
            sys.meta_path.insert(0, _Finder(theirs))


install()
