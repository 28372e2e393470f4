"""What the benchmarks share: timing in turn, rotating buffers, naming the machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import qins


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first processor reports; 32 MiB if it reports none."""
    best = 32 << 20
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        best = max(best, int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return best


def machine() -> dict[str, object]:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "last_level_cache_mib": last_level_cache_bytes() >> 20,
        "isas": qins.isas(),
        "threads": qins.get_num_threads(),
    }


def race(contestants: dict[str, Callable[[int], object]], seconds: float = 1.0, rounds: int = 3) -> dict[str, float]:
    """Best time in seconds of each contestant, called in turn with 0, 1, 2, ... for `seconds` each.

    Taking turns spreads the noise of a shared machine evenly, and the best of many is what the machine can do.
    """
    best = dict.fromkeys(contestants, float("inf"))
    spent = dict.fromkeys(contestants, 0.0)
    n = 0
    while any(spent[c] < seconds or n < rounds for c in contestants):
        for name, run in contestants.items():
            if spent[name] >= seconds and n >= rounds:
                continue
            begin = time.perf_counter()
            run(n)
            took = time.perf_counter() - begin
            spent[name] += took
            best[name] = min(best[name], took)
        n += 1
    return best
