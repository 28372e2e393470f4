"""Conversion of checkpoints on disk, one tensor at a time."""

from .quantizing import quantize_checkpoint

__all__ = [
    "quantize_checkpoint",
]
