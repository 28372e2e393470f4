"""The machine's name, its available memory, and the peak memory of this process."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

from .cgroups import directories

_PROC = Path("/proc")


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_bytes(*, swap: bool = False) -> int | None:
    """Return the memory that this process can still take; None where unknown.

    It is within the limits of its control groups (versions 1 and 2) and of its address space (RLIMIT_AS).

    Args:
        swap: count the machine's free swap space, too.

    """
    known = [n for n in (_machine(swap), *_groups(), _address_space()) if n is not None]
    return max(0, min(known)) if known else None


def _machine(swap: bool) -> int | None:
    try:
        told = dict(line.split(":") for line in (_PROC / "meminfo").read_text().splitlines())
        free = int(told["MemAvailable"].split()[0])
        return (free + (int(told["SwapFree"].split()[0]) if swap else 0)) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _groups() -> Iterator[int]:
    """Yield what each control group with a limit leaves."""
    for base, version in directories("memory"):
        limit, usage, part = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # of the group and those below it
            2: ("memory.max", "memory.current", ""),
        }[version]
        try:
            stat = dict(line.split() for line in (base / "memory.stat").read_text().splitlines())
            # the kernel drops these when needed
            cached = int(stat[f"{part}inactive_file"]) + int(stat[f"{part}active_file"])
            yield int((base / limit).read_text()) - int((base / usage).read_text()) + cached
        except (OSError, ValueError, KeyError):  # no such group, or no limit
            pass


def _address_space() -> int | None:
    try:
        import resource  # Unix only

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        return limit - int((_PROC / "self" / "statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError, IndexError):
        return None


def require_memory(needed: int, what: str) -> None:
    """Raise a MemoryError that names both, if `what` needs more bytes than this process can still take."""
    there = available_bytes(swap=True)
    if there is not None and needed > there:
        raise MemoryError(f"{what}: needs {needed:,} bytes of memory, {there:,} are available")


def require_address_space(needed: int, what: str) -> None:
    """Raise a MemoryError that names both, if `what` maps more bytes than RLIMIT_AS leaves."""
    there = _address_space()
    if there is not None and needed > there:
        raise MemoryError(f"{what}: needs {needed:,} bytes of address space, {max(0, there):,} are available")


def peak_resident_bytes() -> int | None:
    """Return the peak resident memory since the last reset; None where the system does not report it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak_resident_bytes() -> None:
    """Reset the peak to what is resident now, where the system supports it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
