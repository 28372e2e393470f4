"""Conversion of checkpoints on disk, one tensor at a time."""

from .originals import check_original, record_original
from .quantizing import quantize_checkpoint

__all__ = [
    "check_original",
    "quantize_checkpoint",
    "record_original",
]
