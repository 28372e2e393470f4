"""Advice to the system about pages of mapped files."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qins.system import let_go

pytestmark = [pytest.mark.once, pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")]

# Reads a file's tensor and keeps it mapped until its input ends.
OTHER = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as f:
    t = f.get_tensor("t")
t.sum()
print("mapped", flush=True)
sys.stdin.read()
"""


def resident_bytes_of_files():
    with open("/proc/self/status") as f:
        (line,) = (line for line in f if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def test_pages_that_another_process_has_mapped_are_released(tmp_path):
    original = torch.arange(4 << 20, dtype=torch.float32)
    save_file({"t": original}, tmp_path / "file")
    command = [sys.executable, "-c", OTHER, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mapped\n"
        with safe_open(tmp_path / "file", "pt") as f:
            tensor = f.get_tensor("t")
        tensor.sum()
        before = resident_bytes_of_files()
        let_go(tensor)
        assert before - resident_bytes_of_files() > 0.9 * tensor.nbytes
        assert torch.equal(tensor, original)
        other.stdin.close()


def test_nothing_written_is_lost(tmp_path):
    save_file({"t": torch.zeros(1 << 20)}, tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as f:
        mapped = f.get_tensor("t")
    for tensor in (mapped, torch.zeros(1 << 20)):
        tensor[5000] = 7.0
        let_go(tensor)
        assert tensor[5000] == 7.0
