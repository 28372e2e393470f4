"""What generate.py measures of each engine: speed and resident memory."""

from __future__ import annotations

import argparse
import contextlib
import resource
import time
from collections.abc import Callable
from pathlib import Path


class Memory:
    """Resident memory: before the model, and its peak since `watch` (on Linux; elsewhere the peak of the process)."""

    def __init__(self) -> None:
        self.before = self._read("VmRSS")

    @staticmethod
    def _read(field: str) -> float:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def watch(self) -> None:
        """Reset the peak, so that it excludes making the model."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def figures(self, weights: float) -> dict[str, float]:
        peak = self._read("VmHWM")
        return {"weights MB": weights, "peak resident MB": peak, "beside weights MB": peak - self.before - weights}


def best_of(run: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def speeds_of(evaluate: Callable[[int, int], object], arguments: argparse.Namespace) -> dict[str, float]:
    """Return the speeds of an engine; `evaluate` takes the number of tokens of a prompt, and of those that follow."""
    evaluate(16, 2)
    prefill = best_of(lambda: evaluate(arguments.prompt, 0), arguments.repeats)
    first = best_of(lambda: evaluate(16, 0), arguments.repeats)
    all_of = best_of(lambda: evaluate(16, arguments.tokens), arguments.repeats)
    return {"decode tokens/s": arguments.tokens / (all_of - first), "prefill tokens/s": arguments.prompt / prefill}
