"""Codes in huge pages: the same codes, wherever they are."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from qins.system import arena_for, huge_pages, rounded

pytestmark = pytest.mark.skipif(not huge_pages._are_there(), reason="NOT RUN: this system has no huge pages")


def in_huge_pages(address: int) -> int:
    """Return the bytes in huge pages of the mapping that has this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            begin, end = (int(n, 16) for n in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("AnonHugePages"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.fixture
def of_any_size(monkeypatch):
    monkeypatch.setattr(huge_pages, "_LEAST", 1)


def test_arrays_of_an_arena(of_any_size):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, shape).astype(dtype) for shape, dtype in [
        ((5, 7), np.uint8), ((3,), np.float32), ((2, 1000), np.uint16), ((), np.float64), ((0, 4), np.uint8),
        ((9, 2000), np.uint8),
    ]]  # fmt: skip
    arrays.append(arrays[-1].T)
    arena = arena_for(sum(rounded(a.nbytes) for a in arrays))
    copies = [arena.copy(a) for a in arrays]
    for a, b in zip(arrays, copies, strict=True):
        assert np.array_equal(a, b)
        assert a.dtype == b.dtype
        assert b.flags.c_contiguous
        assert b.nbytes == 0 or b.ctypes.data % 64 == 0
    copies[0][...] = 1
    copies[2][...] = 2
    assert np.array_equal(copies[1], arrays[1])
    assert np.array_equal(copies[-1], arrays[-1])


def test_a_large_arena_is_in_huge_pages():
    array = np.ones((64 << 20) // 4, np.float32)
    copied = arena_for(array.nbytes).copy(array)
    if in_huge_pages(copied.ctypes.data) == 0:
        pytest.skip("NOT RUN: the system has no huge page left")
    assert in_huge_pages(copied.ctypes.data) >= 32 << 20


def test_without_an_arena(of_any_size, monkeypatch):
    assert arena_for(1000) is not None
    monkeypatch.setenv("QINS_HUGE_PAGES", "0")
    assert arena_for(1000) is None
    monkeypatch.setenv("QINS_HUGE_PAGES", "yes")
    with pytest.raises(ValueError, match="QINS_HUGE_PAGES: expected 0 or 1, got 'yes'"):
        arena_for(1000)
    monkeypatch.delenv("QINS_HUGE_PAGES")
    assert arena_for(1 << 60) is None  # more than there is
    with monkeypatch.context() as m:
        m.setattr(huge_pages, "available_bytes", lambda: 1100)
        assert arena_for(1000) is None
        m.setattr(huge_pages, "available_bytes", lambda: None)  # unknown
        assert arena_for(1000) is not None
        assert arena_for(1 << 60) is None  # no such address space
    with monkeypatch.context() as m:
        m.setattr(mmap, "MADV_HUGEPAGE", -1)  # so that madvise fails
        assert arena_for(1000) is None
    monkeypatch.setattr(huge_pages, "_LEAST", 1001)
    assert arena_for(1000) is None


def test_systems_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "enabled")
    assert not huge_pages._are_there()
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert not huge_pages._are_there()
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages._are_there()
    monkeypatch.setattr(sys, "platform", "win32")
    assert not huge_pages._are_there()
