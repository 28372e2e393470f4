"""Registers qins with transformers and PEFT as soon as they are imported, without importing either.

transformers has no entry point for quantizers: for an unknown quant_method it warns and continues with random weights.
torch has an entry point (group `torch.backends`, since 2.5) and calls `install` at the end of `import torch`. So a
quantized checkpoint loads in any program, wherever qins is installed. `import qins` calls it too, for torch 2.4 and for
TORCH_DEVICE_BACKEND_AUTOLOAD=0.

This module is outside the package, because importing anything inside it would import NumPy and the extension, which
many programs never need. It must not fail, because an exception here would make `import torch` fail.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_QUANTIZERS = "transformers.quantizers.auto"
# A third-party module, and the module of qins to import after it.
_AFTER = {
    _QUANTIZERS: "qins.hf",
    "peft.tuners.lora.config": "qins.hf.peft",
    # imported after the quantizers: a second chance if importing those was what first imported torch
    "transformers.modeling_utils": "qins.hf",
}


def _register(theirs: str) -> None:
    """Import our module; if that fails, refuse to load codes, and leave everything else working."""
    try:
        importlib.import_module(_AFTER[theirs])
    except Exception as e:
        if theirs.startswith("transformers"):
            _refuse_codes(e)
        else:
            warnings.warn(f"qins: {theirs.partition('.')[0]} cannot use quantized layers: {e}", stacklevel=2)


def _refuse_codes(error: Exception) -> None:
    """Register a quantization config that only raises: without one, codes would be replaced by random weights."""

    class Unusable:
        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            raise ImportError(
                f"the checkpoint's weights are codes of qins, which cannot be used here: {error}"
            ) from error

    known = sys.modules[_QUANTIZERS].__dict__
    known["AUTO_QUANTIZATION_CONFIG_MAPPING"].setdefault("qins", Unusable)
    known["AUTO_QUANTIZER_MAPPING"].setdefault("qins", Unusable)


class _Loader(importlib.abc.Loader):
    """Runs another loader, then registers qins."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module.__name__)

    def __getattr__(self, name: str) -> Any:
        """Return another attribute of the wrapped loader, such as the one that gives the module's source."""
        return getattr(self.loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Intercepts the first import of one module."""

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
            spec.loader = _Loader(spec.loader)
        return spec


def _is_loaded(name: str) -> bool:
    """Return whether a module has been imported completely."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def install() -> None:
    """Register with each library now if it is loaded, otherwise as soon as it is."""
    waiting = {f.theirs for f in sys.meta_path if isinstance(f, _Finder)}
    for theirs in _AFTER:
        if _is_loaded(theirs):
            _register(theirs)
        elif theirs not in sys.modules and theirs not in waiting:
            sys.meta_path.insert(0, _Finder(theirs))
