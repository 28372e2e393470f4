"""Builds the extension; everything else about the project is in pyproject.toml."""

import sys
from pathlib import Path

import numpy
from setuptools import Extension, setup

ROOT = Path(__file__).parent

# One list for every processor: each instruction set's file names its own target (see words.h).
# Fused multiply-adds that the compiler contracts on its own would change codes between platforms.
if sys.platform == "win32":
    flags = ["/O2", "/std:c11", "/experimental:c11atomics", "/fp:precise"]
else:
    flags = ["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]

setup(
    ext_modules=[
        Extension(
            "qins._core",
            sources=sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "qins_ext").glob("*.c")),
            depends=sorted(
                p.relative_to(ROOT).as_posix()
                for pattern in ("*.h", "*.inc", "*.def")
                for p in (ROOT / "qins_ext").glob(pattern)
            ),
            include_dirs=["qins_ext", numpy.get_include()],
            extra_compile_args=flags,
        )
    ]
)
