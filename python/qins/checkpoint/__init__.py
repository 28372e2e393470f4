"""Conversion of checkpoints on disk, one tensor at a time."""

from .destination import Destination
from .originals import check_original, record_original
from .quantizing import Conversion, Shards, quantize_checkpoint

__all__ = [
    "Conversion",
    "Destination",
    "Shards",
    "check_original",
    "quantize_checkpoint",
    "record_original",
]
