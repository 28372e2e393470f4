"""torch tensors as NumPy arrays, and torch's threads as ours. Imported only where torch is in use."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
except ImportError as e:  # pragma: no cover - depends on the environment
    raise ImportError("this part of qins needs torch: pip install 'qins[torch]'") from e

from . import _core

_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}
Array = np.ndarray[Any, Any]


def dtype_name(dtype: torch.dtype) -> str:
    """Name of an element type as the core knows it."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise TypeError(f"dtype: expected one of {', '.join(_NAMES.values())}, got {dtype}") from None


def tensor_to_array(t: torch.Tensor) -> tuple[Array, str]:
    """View a floating-point tensor as an array (uint16 for bfloat16) with its element type's name.

    A tensor on another device than the CPU is copied.
    """
    if t.dtype not in _NAMES:
        raise TypeError(f"weights: expected one of {', '.join(_NAMES.values())}, got {t.dtype}")
    name = _NAMES[t.dtype]
    t = t.detach().cpu()
    return (t.view(torch.uint16) if name == "bfloat16" else t).numpy(), name


def _share_torch_threads() -> None:
    """Run the core's parallel work on the OpenMP threads that torch already has.

    After each operation libgomp's threads spin for a while in wait of the next; a second pool would
    have to fight them for the cores. Where torch brings another runtime, the core keeps its pool.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            address = ctypes.cast(
                ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel, ctypes.c_void_p
            ).value
        except (OSError, AttributeError):
            continue
        if address:
            _core.set_fork_join(address)
            return


_share_torch_threads()
