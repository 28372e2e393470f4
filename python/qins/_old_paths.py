"""Module names from before the package had rooms. Importing one still works for one release, with a warning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# Old module of `qins` to the modules that hold its names now.
MOVED = {
    "activations": ("calibration.activations",),
    "array": ("codec.array", "codec.fields", "codec.dtypes"),
    "bench": ("cli.bench",),
    "blocks": ("calibration.blocks",),
    "cache": ("nn.kv_cache", "hf.cache"),
    "chat": ("cli.chat",),
    "checkpoint_plan": ("checkpoint.planning",),
    "coded": ("nn.coded", "codec.group_sizes"),
    "conversion": ("nn.converting", "nn.choosing", "nn.report", "nn.comparing", "codec.quality", "system.progress_bar"),
    "demo": ("cli.demo",),
    "evaluate": ("fidelity.metrics",),
    "evaluation": ("fidelity.evaluation",),
    "experts": ("nn.experts",),
    "feedback": ("codec.feedback",),
    "gguf_source": ("files.gguf",),
    "golden": ("codec.golden",),
    "inspection": ("files.inspecting", "files.inspection_report", "files.layers", "compat.seed_checkpoint"),
    "linear": ("nn.linear", "nn.embedding"),
    "machine": ("system.machine",),
    "memory": ("nn.memory",),
    "models": ("hf.models", "hf.packaged", "system.text"),
    "ops": ("nn.ops", "codec.tensors", "codec.fields"),
    "peers": ("fidelity.peers",),
    "planning": ("calibration.planning",),
    "recording": ("fidelity.recording",),
    "report": ("fidelity.report",),
    "shards": ("files.shards",),
    "source_formats": ("files.source_formats",),
    "subjects": ("fidelity.subjects",),
}
# `qins.ops` is a public name and stays one.
PUBLIC = {"ops"}


class _Moved(ModuleType):
    """A module under its old name; its names are looked up in the modules that hold them now."""

    def __getattr__(self, name: str) -> object:
        if not name.startswith("__"):
            package, _, old = self.__name__.rpartition(".")
            for place in MOVED[old]:
                module = importlib.import_module(f"{package}.{place}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = name.rpartition(".")
        if package != __package__ or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        package, _, old = module.__name__.rpartition(".")
        places = [f"{package}.{place}" for place in MOVED[old]]
        importlib.import_module(places[0])
        module.__doc__ = f"Moved to {', '.join(places)}."
        if old not in PUBLIC:
            warnings.warn(f"{module.__name__} has moved to {', '.join(places)}", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Serve the old names in this process."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.append(_Finder())
