"""Running a converted language model with NumPy and the core alone: no torch, no transformers."""

from .model import Decoder

__all__ = ["Decoder"]
