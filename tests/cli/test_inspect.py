"""`qins inspect`."""

from __future__ import annotations

import json

import pytest
import terminal
import torch
from small import converted

pytestmark = pytest.mark.once


def test_command_line(tmp_path):
    state = converted("golden").state_dict()
    torch.save(state, tmp_path / "a.pt")
    done = terminal.run("inspect", tmp_path / "a.pt", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_by_kind"]["stored"] == 4800
    torch.save(state | {"0.stored": state["0.stored"].float()}, tmp_path / "b.pt")
    done = terminal.run("inspect", tmp_path / "b.pt")
    assert done.returncode == 1
    assert "not quantized" in done.stdout
    (tmp_path / "c.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:500])
    done = terminal.run("inspect", tmp_path / "c.pt")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "c.pt" in done.stderr
