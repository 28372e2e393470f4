"""The number of threads that the core uses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .cgroups import directories

_chosen: int | None = None


def _cgroup_limit() -> float:
    """CPUs that the quotas of this process's control groups allow; infinity without a quota."""
    limits = [limit for base, version in directories("cpu") if (limit := _quota(base, version)) is not None]
    return min(limits, default=float("inf"))


def _quota(group: Path, version: int) -> float | None:
    """CPUs that one group may use; None without a quota."""
    try:
        if version == 2:
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max"
        return None


def _default() -> int:
    """OMP_NUM_THREADS, else the CPUs that this process may run on, within its control group's quota."""
    try:
        wanted = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0])
        if wanted > 0:
            return wanted
    except ValueError:
        pass
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, int(_cgroup_limit()) if _cgroup_limit() < cpus else cpus))


_DEFAULT = _default()


def set_num_threads(n: int | None) -> None:
    """Set the number of threads for encoding, decoding and products.

    Args:
        n: the number; None follows torch (or the machine) again.

    Raises:
        ValueError: `n` is not a positive integer or None.

    """
    global _chosen
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ValueError(f"n: expected a positive integer or None, got {n!r}")
    _chosen = n


def get_num_threads() -> int:
    """Return the number of threads in use.

    It is what `set_num_threads` set, else torch's number once torch is imported, else the default: OMP_NUM_THREADS, or
    the CPUs that this process may run on (affinity and control group).
    """
    if _chosen is not None:
        return _chosen
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    return _DEFAULT
