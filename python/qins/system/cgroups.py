"""Control groups: the directories whose files limit this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def directories(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the directories of this process's groups, and those above them, each with its version of control groups.

    A container may see only its own group, as the root, whatever path the kernel names. So some may not exist.

    Args:
        controller: name of a controller of version 1, such as "memory".

    """
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        lines = []
    paths = {1: "/", 2: "/"}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            paths[1] = path
        elif number == "0" and not controllers:
            paths[2] = path
    for version, base in ((2, ROOT), (1, ROOT / controller)):
        parts = [p for p in paths[version].split("/") if p not in ("", ".", "..")]
        for count in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:count]), version
