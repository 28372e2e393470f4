"""Runs scripts of the prototype (the seed) unchanged on the C core: `python -m qins.compat script.py [arguments]`.

These modules come from here, whatever files are beside the script:

    qins_codec, src.qins_codec                  QINSCodec, QINSLinear, QINSKVCache
    qins_weight_codec, src.qins_weight_codec    qins_encode, qins_decode, QINSWeightLinear, ...

All other imports work as usual, including other modules in a directory `src` beside the script.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import rational
from ..codec import QINSCodec, decode_fields, encode
from ..nn import QINSKVCache, floats_as_bits, multiply

_NAMES = ("stored", "sign", "log_min", "log_max")


class QINSLinear(nn.Module):
    """The prototype's layer: `golden` codes in buffers stored, sign, log_min and log_max; not an nn.Linear.

    Args:
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        bias: whether the layer has a bias.

    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self.register_buffer("stored", torch.full(shape, 128, dtype=torch.uint8))
        self.register_buffer("sign", torch.ones(shape, dtype=torch.int8))
        self.register_buffer("log_min", torch.tensor(-10.0))
        self.register_buffer("log_max", torch.tensor(0.0))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> QINSLinear:
        """Quantize a layer; the bias is copied.

        Raises:
            TypeError: `linear` is not an nn.Linear.
            ValueError: a weight is NaN or infinite.

        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        new = cls(0, 0, bias=False)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        fields = encode(linear.weight, "golden").fields
        for name in _NAMES:
            new._buffers[name] = torch.from_numpy(fields[name]).to(linear.weight.device)
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach().clone())
        return new.train(linear.training)

    def decode_weight(self) -> torch.Tensor:
        """Return the dequantized weight, a new float32 tensor (out_features, in_features) at each call."""
        return decode_fields("golden", dict(self._buffers), None, torch.float32)  # type: ignore[arg-type]

    @property
    def weight(self) -> torch.Tensor:
        """The result of `decode_weight()`."""
        return self.decode_weight()

    def clear_cache(self) -> None:
        """Do nothing: products come straight from the codes, so there is no dequantized copy to clear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ W.T + bias; x is (..., in_features)."""
        fields: list[torch.Tensor] = [self._buffers[n] for n in _NAMES]  # type: ignore[misc]
        y = multiply(x, fields, "golden", None)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QINSLinear:
        with floats_as_bits(self, _NAMES):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """in_features, out_features and bias."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _codec_module(name: str) -> dict[str, Any]:
    return {"QINSCodec": QINSCodec, "QINSLinear": QINSLinear, "QINSKVCache": QINSKVCache}


def _weight_codec_module(name: str) -> dict[str, Any]:
    names = ("qins_encode", "qins_decode", "QINSWeightLinear", "convert_linear_to_qins", "verify_qins_layer")
    return {n: getattr(rational, n) for n in names}


_MODULES: dict[str, Callable[[str], dict[str, Any]]] = {
    "qins_codec": _codec_module,
    "src.qins_codec": _codec_module,
    "qins_weight_codec": _weight_codec_module,
    "src.qins_weight_codec": _weight_codec_module,
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the prototype's modules before sys.path, and provides a package `src` if there is none."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the prototype's modules; decline all others."""
        if name in _MODULES:
            return importlib.machinery.ModuleSpec(name, self, origin="qins.compat")
        if name == "src":
            found = importlib.machinery.PathFinder.find_spec(name, path)
            if found is None or found.submodule_search_locations is None:  # absent, or a plain module with that name
                return importlib.machinery.ModuleSpec(name, self, origin="qins.compat", is_package=True)
            return found
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Let Python create an ordinary module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill in the module's names."""
        make = _MODULES.get(module.__name__)
        if make is not None:
            module.__doc__ = f"{module.__name__}, served by qins.compat on the C core."
            vars(module).update(make(module.__name__))


def install() -> None:
    """Provide the prototype's modules in this process from now on, replacing any that are already imported."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _MODULES:
        loaded = sys.modules.get(name)
        if loaded is not None and not isinstance(getattr(loaded.__spec__, "loader", None), _Finder):
            del sys.modules[name]


def main(arguments: list[str] | None = None) -> None:
    """Run a script as `python script.py [arguments]` would, with the prototype's modules in place."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m qins.compat script.py [arguments]\n\n" + (__doc__ or ""))
        raise SystemExit(0 if arguments else 2)
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"qins.compat: {script}: no such file")
    install()
    sys.argv = [str(script), *arguments[1:]]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")
