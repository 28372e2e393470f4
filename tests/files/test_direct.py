"""Direct reads and writes give the same bytes as those through the page cache."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qins.files import ahead as reading_ahead
from qins.files import direct as direct_io
from qins.files import open_checkpoint
from qins.system import is_resident

pytestmark = pytest.mark.once


@pytest.fixture
def direct(tmp_path: Path) -> Path:
    """Return a directory whose files can be read and written directly."""
    if not direct_io.KNOWN:
        pytest.skip("NOT RUN: this system has no direct reading")
    try:
        os.close(os.open(tmp_path / "try", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as e:
        pytest.skip(f"NOT RUN: no direct writing in {tmp_path}: {e}")
    return tmp_path


def pieces(sizes: list[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, n, np.uint8) for n in sizes]


SIZES = [8, 4096, 1, 4095, 4097, 0, 3 * 4096 + 5, 12345, (4 << 20) + 4096 + 17, 9 << 20]


@pytest.mark.parametrize("refuses", [False, True])
def test_written_parts_are_what_was_given(direct, monkeypatch, refuses):
    if refuses:  # as a file system with larger blocks would

        def pwrite(*_):
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(os, "pwrite", pwrite)
    parts, writer = pieces(SIZES), direct_io.DirectWriter(direct / "f")
    places = np.cumsum([0, *(len(p) for p in parts)])
    writer.truncate(int(places[-1]))
    for i in np.random.default_rng(1).permutation(len(parts)):
        writer.write(parts[i].data, int(places[i]))
    writer.close()
    writer.close()
    assert (direct / "f").read_bytes() == b"".join(p.tobytes() for p in parts)


def test_an_error_while_writing_is_not_passed_over(direct, monkeypatch):
    def pwrite(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    writer = direct_io.DirectWriter(direct / "f")
    with pytest.raises(OSError, match="No space left"):
        writer.write(memoryview(bytes(1 << 20)), 0)
    writer.close()


@pytest.mark.parametrize(("begin", "size"), [(0, 10), (4096, 4096), (5, 4091), (4095, 2), (100, (5 << 20) + 1)])
def test_read_parts_are_what_was_written(direct, begin, size):
    (data,) = pieces([6 << 20])
    (direct / "f").write_bytes(data.tobytes())
    first, length = direct_io.blocks_around(begin, size)
    assert (first % 4096, length % 4096) == (0, 0)
    assert first <= begin
    assert first + length >= begin + size
    memory = memoryview(direct_io.aligned_memory(length))
    direct_io.read_directly(direct / "f", begin, size, memory)
    assert memory[begin - first :][:size] == data[begin : begin + size].data


def test_the_last_block_of_a_file_may_be_short_and_a_short_file_is_an_error(direct):
    (direct / "f").write_bytes(bytes(range(250)) * 40)
    memory = memoryview(direct_io.aligned_memory(16384))
    direct_io.read_directly(direct / "f", 8192, 10000 - 8192, memory)
    assert memory[:10] == (bytes(range(250)) * 40)[8192:8202]
    with pytest.raises(OSError, match="expected at least 10001 bytes"):
        direct_io.read_directly(direct / "f", 0, 10001, memory)


def test_tensors_are_read_ahead_past_the_page_cache(direct, monkeypatch):
    tensors = {f"t{i}": torch.randn(n, 700) for i, n in enumerate((500, 1, 900, 600, 400))}
    tensors["half"] = torch.randn(800, 701).bfloat16()
    save_file(tensors, direct / "m.safetensors")
    read: list[int] = []
    read_directly = reading_ahead.read_directly
    monkeypatch.setattr(reading_ahead, "read_directly", lambda *a: (read.append(a[2]), read_directly(*a)))
    for cached in (False, True):
        monkeypatch.setattr(reading_ahead, "is_resident", lambda _, cached=cached: cached)
        read.clear()
        with reading_ahead.ReadAhead(open_checkpoint(direct / "m.safetensors")) as ahead:
            for name in tensors:
                ahead.announce(name)
            for name, expected in tensors.items():
                assert torch.equal(ahead.load(name), expected), name
                assert torch.equal(ahead.load(name), expected), name  # mapped
            rooms = len(ahead._rooms)
        large = [t.nbytes for t in tensors.values() if t.nbytes >= 1 << 20]
        assert (read, rooms > 0) == (([], False) if cached else (large, True))


def test_memory_is_used_again_when_its_tensor_is_gone(direct, monkeypatch):
    save_file({f"t{i}": torch.full((600, 700), float(i)) for i in range(4)}, direct / "m.safetensors")
    monkeypatch.setattr(reading_ahead, "is_resident", lambda _: False)
    with reading_ahead.ReadAhead(open_checkpoint(direct / "m.safetensors")) as ahead:
        ahead.announce("t0")
        kept = ahead.load("t0")[:3]
        places = set()
        for name in ("t1", "t2", "t3"):
            ahead.announce(name)
            tensor = ahead.load(name)
            places.add(tensor.data_ptr() // 4096)
            del tensor
        assert len(places) == 1
        assert kept.data_ptr() // 4096 not in places
        assert (kept == 0).all()


def test_what_the_page_cache_holds_is_known(direct):
    path = direct / "m.safetensors"
    save_file({f"t{i}": torch.ones(16 << 20) for i in range(2)}, path)
    with path.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    tensor = open_checkpoint(path).load("t1")
    assert not is_resident(tensor)
    tensor.sum()
    assert is_resident(tensor)
    assert is_resident(torch.ones(100))


def test_a_file_system_without_direct_reading_is_mapped(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(reading_ahead, "read_directly", refuse)
    monkeypatch.setattr(reading_ahead, "is_resident", lambda _: False)
    tensor = torch.randn(600, 700)
    save_file({"t": tensor}, tmp_path / "m.safetensors")
    with reading_ahead.ReadAhead(open_checkpoint(tmp_path / "m.safetensors")) as ahead:
        ahead.announce("t")
        assert torch.equal(ahead.load("t"), tensor)
