"""A few calls of each long operation fail once; `make trust-faults` makes all of them fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

TOOL = Path(__file__).with_name("faults.py")

pytestmark = [
    pytest.mark.long,
    pytest.mark.once,
    pytest.mark.skipif(
        sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names or shutil.which("cc") is None,
        reason="the preloaded library needs Linux, glibc and a C compiler",
    ),
]

# a few processes, so that importing torch takes little of the time
SHARES = {
    "conversions": ["quantize", "quantize, reading directly", "quantize --exact resumed", "restore"],
    "calibration": ["quantize --calibrate resumed", "restore resumed"],
    "loading": ["load verified", "load restored", "inspect", "save_pretrained", "cache of the demo's model"],
}


@pytest.mark.parametrize("share", SHARES)
def test_calls_that_fail_once(share):
    command = [sys.executable, str(TOOL), "--brief", "--json", "--jobs", "1", *SHARES[share]]
    done = subprocess.run(command, capture_output=True, text=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert [t["scenario"] for t in told] == SHARES[share], done.stderr
    assert [p for t in told for p in t["problems"]] == []
    assert done.returncode == 0, done.stderr
    for t in told:
        assert t["faults"] >= 10
        assert set(t["outcomes"]) >= {"right", "error"}, "the faults were not met"
