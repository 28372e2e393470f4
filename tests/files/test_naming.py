"""Errors of the system name their file."""

from __future__ import annotations

import errno

import pytest

from qins.files import open_checkpoint
from qins.files.reading import open_safetensors
from qins.system import atomically, locked, naming_file

safetensors = pytest.importorskip("safetensors")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("No space left on device (os error 28)"),
    safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk(tmp_path, error):
    with pytest.raises(OSError, match="No space left on device: '.*/model'") as raised, naming_file(tmp_path / "model"):
        raise error
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error", "other"),
    OSError("out: needs 10 bytes, the disk has 5 free"),
    ValueError("model: not readable: Input/output error (os error 5)"),
    KeyError("weight"),
])  # fmt: skip
def test_other_errors_are_unchanged(error):
    told = str(error)
    with pytest.raises(type(error)) as raised, naming_file("model"):
        raise error
    assert raised.value is error
    assert str(raised.value) == told


def test_no_memory_for_a_mapping():
    with pytest.raises(OSError, match="Cannot allocate memory: 'model'"), naming_file("model"):
        raise MemoryError("Cannot allocate memory (os error 12)")


def test_writing(tmp_path, monkeypatch):
    def failing(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises(OSError, match="Input/output error: '.*/codes'"), atomically(tmp_path / "codes") as temporary:
        temporary.write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_deleted_is_released(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input"), locked(tmp_path / "lock", "held"):
        patch.setattr("pathlib.Path.unlink", failing)
    with locked(tmp_path / "lock", "held"):
        pass


def test_a_signal_does_not_interrupt_opening(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path, opened = tmp_path / "model.safetensors", safetensors.safe_open
    save_file({"a": torch.arange(3)}, path)
    left = [1, 2]

    def interrupted(*args, **kwargs):
        if left:
            left.pop()
            raise RuntimeError(f"unable to open file <{path}> in read-only mode: Interrupted system call (4)")
        return opened(*args, **kwargs)

    monkeypatch.setattr("safetensors.safe_open", interrupted)
    with open_safetensors(path) as f:
        assert f.get_tensor("a").tolist() == [0, 1, 2]
    assert not left
    monkeypatch.undo()
    assert open_checkpoint(path).load("a").tolist() == [0, 1, 2]
