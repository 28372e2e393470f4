"""Calibrated codes, chosen on several machines: a task per layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..calibration import Choice, choose_layer
from ..system import VERSION
from .tasks import result_of, task_options
from .work import require_version

_BASE = 1 << 30  # bytes of memory that a worker needs besides matrices


def choose(version: str, *arguments: Any) -> Choice:
    """Choose the codes of one layer."""
    require_version(version)
    return choose_layer(*arguments)


class RayRounding:
    """Chooses the codes of layers as tasks of the cluster that Ray is connected to; see `qins.calibration`.

    Args:
        cpus: processors per layer.

    """

    def __init__(self, cpus: float = 1) -> None:
        self.cpus = cpus
        self._function: Any = None

    def submit(self, name: str, arguments: tuple[Any, ...]) -> Callable[[], Choice]:
        """Start a task; return a function that waits for its result."""
        import ray

        weight = arguments[0]
        rows, columns = weight.shape
        # float64 matrices while the moments are factorized, float32 ones while columns are rounded
        memory = _BASE + 40 * columns**2 + 16 * rows * columns
        options = task_options(self.cpus, memory, name)
        self._function = self._function or ray.remote(choose)
        function = self._function.options(name=f"qins round {name}", **options)
        task = function.remote(VERSION, weight.detach(), *arguments[1:])
        return lambda: result_of(task, name)
