"""transformers and PEFT: quantizing models while they load, saving them, and loading them again.

Importing this package registers quant_method "qins".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..system import lazily
from .card import CARD, hub_name, write_card
from .config import QinsConfig
from .embeddings import input_embedding, tied_output, tied_to
from .models import (
    load_causal_lm,
    load_tokenizer,
    loading,
    model_class,
    require_causal_lm,
    require_transformers,
)
from .modules import check_layer, pending_experts, pending_layers
from .names import Names, guard
from .packaged import cache_directory, find_model
from .quantizer import QinsHfQuantizer
from .registering import attach, load, register
from .released import find_source, load_floats

if TYPE_CHECKING:
    from .cache import QINSCache
    from .calibrating import Calibration, CheckpointCalibration, tokenized
    from .experts import one_by_one

__all__ = [
    "CARD",
    "Calibration",
    "CheckpointCalibration",
    "Names",
    "QINSCache",
    "QinsConfig",
    "QinsHfQuantizer",
    "attach",
    "cache_directory",
    "check_layer",
    "find_model",
    "find_source",
    "guard",
    "hub_name",
    "input_embedding",
    "load",
    "load_causal_lm",
    "load_floats",
    "load_tokenizer",
    "loading",
    "model_class",
    "one_by_one",
    "pending_experts",
    "pending_layers",
    "register",
    "require_causal_lm",
    "require_transformers",
    "tied_output",
    "tied_to",
    "tokenized",
    "write_card",
]

__getattr__ = lazily(
    __name__,
    {
        "Calibration": "calibrating",
        "CheckpointCalibration": "calibrating",
        "tokenized": "calibrating",
        "one_by_one": "experts",
        "QINSCache": "cache",
    },
)
