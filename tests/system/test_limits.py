"""What limits memory and processors: control groups of both versions, from fake files, and the address space."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qins.system import available_bytes, cgroups, machine, require_memory, threads

pytestmark = pytest.mark.once

GIB = 1 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write files below fake /proc and /sys/fs/cgroup: 8 GiB available, 2 GiB of free swap, no groups yet."""

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "proc/self/cgroup")
    write("proc/meminfo", f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\nSwapFree: {2 * GIB // 1024} kB\n")
    return write


def version_2(write, group, limit, used, cached=0):
    write(f"cgroup/{group}/memory.max", f"{limit}\n")
    write(f"cgroup/{group}/memory.current", f"{used}\n")
    write(f"cgroup/{group}/memory.stat", f"anon 7\ninactive_file {cached}\nactive_file 5\n")


def version_1(write, group, limit, used, cached=0):
    write(f"cgroup/memory/{group}/memory.limit_in_bytes", f"{limit}\n")
    write(f"cgroup/memory/{group}/memory.usage_in_bytes", f"{used}\n")
    text = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 5\n"
    write(f"cgroup/memory/{group}/memory.stat", text)


def test_the_machine_alone(system):
    assert (available_bytes(), available_bytes(swap=True)) == (8 * GIB, 10 * GIB)


@pytest.mark.parametrize("where", ["", "job", "above"])
def test_version_2(system, where):
    """The limit may be the group's, that of one above it, or a container's, which sees its own group as the root."""
    system("proc/self/cgroup", "0::/above/job\n")
    for group in ("", "above", "above/job"):
        version_2(system, group, "max", 3 * GIB)
    version_2(system, {"": "", "above": "above", "job": "above/job"}[where], 2 * GIB, GIB, 1000)
    assert available_bytes() == GIB + 1005


@pytest.mark.parametrize("where", ["", "job"])
def test_version_1(system, where):
    system("proc/self/cgroup", "9:cpu:/elsewhere\n4:memory:/job\n0::/\n")
    unlimited = (1 << 63) - 4096
    version_1(system, "", unlimited, 3 * GIB)
    version_1(system, "job", unlimited, 3 * GIB)
    version_1(system, where, 3 * GIB, GIB, 1000)
    assert available_bytes() == 2 * GIB + 1005


def test_a_group_that_is_full(system):
    version_2(system, "", GIB, GIB + 4096)
    assert available_bytes() == 0


def test_what_is_needed_and_what_there_is(system):
    version_2(system, "", 3 * GIB, GIB)
    require_memory(2 * GIB, "a model")
    with pytest.raises(MemoryError, match=r"a model: needs 3,000,000,000 bytes of memory, 2,147,483,653 are available"):
        require_memory(3_000_000_000, "a model")


def test_a_system_that_tells_nothing(system, tmp_path):
    (tmp_path / "proc/meminfo").write_text("nonsense")
    assert available_bytes() is None
    require_memory(1 << 60, "anything")


def test_processors(system):
    assert threads._cgroup_limit() == float("inf")
    system("proc/self/cgroup", "0::/job\n")
    system("cgroup/job/cpu.max", "max 100000\n")
    system("cgroup/cpu.max", "250000 100000\n")
    assert threads._cgroup_limit() == 2.5
    system("proc/self/cgroup", "3:cpu,cpuacct:/job\n0::/\n")
    system("cgroup/cpu/job/cpu.cfs_quota_us", "150000\n")
    system("cgroup/cpu/job/cpu.cfs_period_us", "100000\n")
    system("cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    system("cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert threads._cgroup_limit() == 1.5


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: only Linux tells the address space in use")
def test_the_address_space():
    lines = """
import resource
from qins.system import available_bytes
resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
unlimited = available_bytes()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 5_000_000, 1 << 40))
assert unlimited > 6_000_000 > available_bytes() > 3_000_000
"""
    subprocess.run([sys.executable, "-c", lines], check=True)
