"""Warnings of the command line about group sizes with slow kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import qins


@pytest.mark.once
def test_slow_group_sizes_are_shown(tmp_path):
    model = nn.Sequential(nn.Linear(300, 20), nn.Linear(20, 20))
    with pytest.warns(UserWarning, match="group_size 100"):
        qins.convert(model, group_size=100)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    config = {"quantization_config": {"group_size": 100}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = qins.inspect(tmp_path)
    assert not report.problems
    assert [n[:35] for n in report.notes] == ["2 layers with group_size 100: produ"]
    assert f"\nnote       {report.notes[0]}" in str(report)
    assert report.to_dict()["notes"] == report.notes
    command = ["bench", "--shape", "64x200", "--rows", "1", "--seconds", "0.01", "--group-size", "100"]
    env = os.environ | {"QINS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "qins.cli", *command], capture_output=True, text=True, env=env)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: group_size 100: products decode the weights first")
    assert done.stderr.count("\n") == 1
    assert "group_size 100" in done.stdout
