"""Several machines, on a Ray cluster: `qins quantize --ray`, `qins eval --ray`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..system import lazily

if TYPE_CHECKING:
    from .converting import RayShards, quantize_on_ray
    from .evaluating import RayWindows
    from .tasks import connected

__all__ = [
    "RayShards",
    "RayWindows",
    "connected",
    "quantize_on_ray",
]

# imported on first use, so that the actor that counts starts without torch
__getattr__ = lazily(
    __name__,
    {
        "RayShards": "converting",
        "RayWindows": "evaluating",
        "connected": "tasks",
        "quantize_on_ray": "converting",
    },
)
