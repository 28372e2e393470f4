"""Conversion on several machines, on a Ray cluster: `qins quantize --ray`."""

from .converting import RayShards, quantize_on_ray

__all__ = [
    "RayShards",
    "quantize_on_ray",
]
