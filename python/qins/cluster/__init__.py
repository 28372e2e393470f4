"""Conversion on several machines, on a Ray cluster: `qins quantize --ray`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..system import lazily

if TYPE_CHECKING:
    from .converting import RayShards, quantize_on_ray

__all__ = [
    "RayShards",
    "quantize_on_ray",
]

# imported on first use, so that the actor that counts starts without torch
__getattr__ = lazily(__name__, {"RayShards": "converting", "quantize_on_ray": "converting"})
