"""The short form of allocations.py; `make trust-allocations` runs the long one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "allocations.py"


@pytest.mark.once
@pytest.mark.long
def test_every_allocation_fails_once():
    if "CS_GNU_LIBC_VERSION" not in os.confstr_names or shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("NOT RUN: failing allocations need glibc and a C compiler")
    done = subprocess.run([sys.executable, PROGRAM, "--brief"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    failures = int(done.stdout.split("failures: ")[1].split(",")[0])
    assert failures > 500, done.stdout  # else the shim did not see the extension
