"""Logarithmic codes of 4 to 8 bits for the weights of language models.

`encode` and `decode` work on NumPy arrays, and `Decoder` runs converted language models with NumPy alone. `QINSLinear`
and `convert` quantize torch models; `QinsConfig` quantizes models as transformers loads them. Importing this package
imports only NumPy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import _qins_autoload

from . import _old_paths, rational
from .codec import (
    EncodedArray,
    ErrorFeedback,
    QINSCodec,
    decode,
    default_group_size,
    encode,
    isa,
    isas,
    matmul,
    use_isa,
)
from .system import VERSION, get_num_threads, lazily, set_num_threads, upward

if TYPE_CHECKING:
    from .calibration import CalibrationReport, Plan, calibrate, plan
    from .compat import load_seed_checkpoint
    from .decoder import Decoder
    from .files import InspectionReport, inspect
    from .hf import QINSCache, QinsConfig, load
    from .nn import (
        ConversionReport,
        MemoryReport,
        QINSEmbedding,
        QINSExperts,
        QINSKVCache,
        QINSLinear,
        convert,
        memory_report,
    )

__version__ = VERSION

__all__ = [
    "CalibrationReport",
    "ConversionReport",
    "Decoder",
    "EncodedArray",
    "ErrorFeedback",
    "InspectionReport",
    "MemoryReport",
    "Plan",
    "QINSCache",
    "QINSCodec",
    "QINSEmbedding",
    "QINSExperts",
    "QINSKVCache",
    "QINSLinear",
    "QinsConfig",
    "calibrate",
    "convert",
    "decode",
    "default_group_size",
    "encode",
    "get_num_threads",
    "inspect",
    "isa",
    "isas",
    "load",
    "load_seed_checkpoint",
    "matmul",
    "memory_report",
    "plan",
    "rational",
    "set_num_threads",
    "use_isa",
]

# Names that are imported on first use, with their rooms. Most need torch or transformers.
_LAZY = {
    "CalibrationReport": "calibration",
    "ConversionReport": "nn",
    "Decoder": "decoder",
    "InspectionReport": "files",
    "MemoryReport": "nn",
    "Plan": "calibration",
    "QINSCache": "hf",
    "QINSEmbedding": "nn",
    "QINSExperts": "nn",
    "QINSKVCache": "nn",
    "QINSLinear": "nn",
    "QinsConfig": "hf",
    "calibrate": "calibration",
    "convert": "nn",
    "inspect": "files",
    "load": "hf",
    "load_seed_checkpoint": "compat",
    "memory_report": "nn",
    "plan": "calibration",
}
_lazy = lazily(__name__, _LAZY)


def _later(room: str, name: str) -> Callable[..., Any]:
    """Return a function that imports its room when it is called."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"qins.{room}"), name)(*args)

    return call


upward.update({name: _later("checkpoint", name) for name in ("check_original", "record_original")})


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"qins.{name}") if name in _old_paths.MOVED else _lazy(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


_old_paths.install()
_qins_autoload.install()
