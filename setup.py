"""Builds the extension; everything else about the project is in pyproject.toml."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

# The package reads numbers from files as they lie there, and maps whole checkpoints.
if sys.byteorder != "little" or sys.maxsize < 2**32:
    sys.exit("qins needs a 64-bit little-endian Python: this one has another byte order or smaller addresses")

# One list for every processor: each instruction set's file names its own target (see words.h).
# Fused multiply-adds that the compiler contracts on its own would change codes between platforms.
if sys.platform == "win32":
    flags = ["/O2", "/std:c11", "/experimental:c11atomics", "/fp:precise"]
else:
    flags = ["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if "-g" not in os.environ.get("CFLAGS", "").split():
        flags.append("-g0")  # Python's own build flags include -g: twice the time, ten times the bytes


# gcc spends a quarter of its time with kernels, and on AArch64 more than half, in a search for common subexpressions
# that finds none; with scalar ones, where it finds some, half of it in looking too far back for what an array holds.
KERNELS = ["-fno-gcse"]
SCALAR_KERNELS = ["--param=sccvn-max-alias-queries-per-access=100"]


def accepts(compiler: list[str], options: list[str]) -> bool:
    """Tell whether a compiler takes options without a warning."""
    command = [*compiler, *options, "-Werror", "-fsyntax-only", "-x", "c", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class BuildExtension(build_ext):
    """Compiles as many files at a time as there are processors; setuptools would compile one.

    QINS_OBJECTS: a directory in which object files remain, for the core's tests; else they are temporary.
    """

    def finalize_options(self) -> None:
        """Choose where object files go."""
        self.build_temp = os.environ.get("QINS_OBJECTS", self.build_temp)
        super().finalize_options()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension."""
        if "QINS_OBJECTS" in os.environ:  # objects may be missing or old where the extension is new
            times = [path.stat().st_mtime for path in Path(self.build_temp).glob("qins_ext/*.o")]
            newest = max((ROOT / source).stat().st_mtime for source in [*ext.sources, *ext.depends])
            self.force = self.force or min(times, default=0.0) < newest
        kernels, scalar = (
            options if self.compiler.compiler_type == "unix" and accepts(self.compiler.compiler, options) else []
            for options in (KERNELS, SCALAR_KERNELS)
        )
        compile_all = self.compiler.compile

        def compile_files(sources: list[str], *args: object, **kwargs: object) -> list[str]:
            if "isa_" in sources[0]:
                more = scalar if sources[0].endswith("isa_scalar.c") else kernels
                kwargs["extra_postargs"] = [*(kwargs["extra_postargs"] or []), *more]
            return compile_all(sources, *args, **kwargs)

        def compile_in_parallel(sources: list[str], *args: object, **kwargs: object) -> list[str]:
            first = compile_files(sources[:1], *args, **kwargs)  # makes the directories and finds the compiler
            # the longest ones first
            rest = sorted(sources[1:], key=lambda s: "isa_" not in s)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                others = pool.map(lambda source: compile_files([source], *args, **kwargs), rest)
                return [*first, *(file for files in others for file in files)]

        self.compiler.compile = compile_in_parallel
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildExtension},
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
    ],
)
