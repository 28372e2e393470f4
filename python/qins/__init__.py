"""8-bit logarithmic codes for the weights of language models.

`encode` and `decode` work on NumPy arrays; `QINSLinear` and `convert` put codes into torch models.
Importing this package imports NumPy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import _qins_autoload

from . import rational
from ._extras import naming_extras
from ._isa import isa, isas, use_isa
from ._threads import get_num_threads, set_num_threads
from .array import EncodedArray, decode, encode, matmul
from .feedback import ErrorFeedback
from .golden import QINSCodec

if TYPE_CHECKING:
    from ._hf_cache import QINSCache
    from ._hf_config import QinsConfig
    from .cache import QINSKVCache
    from .calibration import CalibrationReport, calibrate
    from .coded import default_group_size
    from .conversion import ConversionReport, convert
    from .experts import QINSExperts
    from .hf import load
    from .inspection import InspectionReport, inspect, load_seed_checkpoint
    from .linear import QINSEmbedding, QINSLinear
    from .memory import MemoryReport, memory_report
    from .planning import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "CalibrationReport",
    "ConversionReport",
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

# Names that need torch, and the room each lives in.
_LAZY = {
    "QINSCache": "cache",
    "QINSKVCache": "cache",
    "CalibrationReport": "calibration",
    "calibrate": "calibration",
    "ConversionReport": "conversion",
    "convert": "conversion",
    "default_group_size": "coded",
    "QINSEmbedding": "linear",
    "QINSExperts": "experts",
    "QINSLinear": "linear",
    "InspectionReport": "inspection",
    "QinsConfig": "hf",
    "load": "hf",
    "inspect": "inspection",
    "load_seed_checkpoint": "inspection",
    "MemoryReport": "memory",
    "Plan": "planning",
    "plan": "planning",
    "memory_report": "memory",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'qins' has no attribute {name!r}")
    import importlib

    with naming_extras():
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


_qins_autoload.install()
