"""Which instruction sets run here, against what the kernel says of the processor."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

import qins

AVX2 = {"avx", "avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
VNNI = AVX512 | {"avx512vbmi", "avx512_vnni"}
BF16 = VNNI | {"avx512_bf16"}
NEEDED = {"avx2": AVX2, "avx512": AVX512, "avx512vnni": VNNI}
# an old compiler, or a kernel that grants no tiles, leaves these out
OPTIONAL = {"avx512bf16": BF16, "amx": BF16 | {"amx_tile", "amx_int8", "amx_bf16"}}


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="reads Linux's flags of x86")
def test_sets_are_those_of_the_processor():
    line = next(n for n in Path("/proc/cpuinfo").read_text().splitlines() if n.startswith("flags"))
    flags = set(line.split(":")[1].split())
    expected = {name for name, needed in NEEDED.items() if needed <= flags}
    allowed = {name for name, needed in OPTIONAL.items() if needed <= flags}
    assert set(qins.isas()) - allowed == expected | {"scalar"}
