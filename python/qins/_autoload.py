"""Registers the quantizer as soon as transformers is there, without importing it for those who do not use it.

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

_TARGET = "transformers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    """Another loader, and then our registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("qins.hf")


class _Finder(importlib.abc.MetaPathFinder):
    """Steps in for one module, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Register now if transformers' module is loaded, else when it is."""
    if _TARGET in sys.modules:
        importlib.import_module("qins.hf")
    elif not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
