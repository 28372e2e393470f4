"""What passes where: the core under other compilers, systems and processors, the package under other versions.

    platforms.py                 every check, for an hour or more
    platforms.py NAME...         the checks whose row has one of these words
    platforms.py --write         also renew their rows in docs/platforms.md

Checks run the project's other scripts: tests/core/build.sh and the core's tests in their brief form, tests/pythons.sh,
the tests of the room nn. Where a check cannot run, its row says why. Exits with 1 if one failed. Compilers for other
systems are Debian's packages (gcc-mingw-w64-x86-64-posix, gcc-s390x-linux-gnu, gcc-arm-linux-gnueabihf,
gcc-i686-linux-gnu, wine, qemu-user) and the package `ziglang`. The script installs only the latter, in build/, and
unpacks older compilers there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build/platforms"  # what was downloaded stays there
PAGE = ROOT / "docs/platforms.md"
BEGIN, END = "<!-- tests/trust/platforms.py writes the table below -->", "<!-- end of the table -->"
SUITE = "bullseye"  # of Debian, for compilers older than this system's
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
NUMPYS = ("1.25.2", "1.26.4", "2.0.2", "2.1.3", "2.2.6", "2.3.5", "2.4.6")
TORCHES = ("2.4.0", "2.6.0", "2.9.1", "2.13.0", "2.15.0")
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "WINEDEBUG": "-all", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PATH": f"/usr/lib/ccache:{os.environ['PATH']}",  # one extension is built for each version of Python
}  # fmt: skip


class NotRunError(Exception):
    """Says why a check cannot run here."""


class FailedError(Exception):
    """Says how a check failed."""


@dataclass(frozen=True)
class Check:
    platform: str
    compiler: str
    what: str
    run: Callable[[Path], str]  # gets a directory of its own, returns the outcome

    def row(self, outcome: str) -> str:
        return f"| {self.platform} | {self.compiler} | {self.what} | {outcome} |"


def output_of(*command: str | Path, cwd: Path = ROOT, limit: int = 3600, **environment: str) -> str:
    """Run a command and return what it prints; raise FailedError with its last line if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**ENVIRONMENT, **environment}, timeout=limit,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode != 0:
        print(done.stdout[-3000:], file=sys.stderr)
        raise FailedError(
            next((s for s in reversed(done.stdout.splitlines()) if s.strip()), f"status {done.returncode}")
        )
    return done.stdout


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise NotRunError(f"no {program}")


def pip_install(folder: Path, *packages: str) -> None:
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        try:
            output_of(*pip, "-c", str(ROOT / "constraints.txt"), "--target", str(folder), *packages)
        except FailedError as e:
            shutil.rmtree(folder, ignore_errors=True)
            raise NotRunError(f"{' '.join(packages)} cannot be installed: {e}") from None


# -- compilers ---------------------------------------------------------------------------------------


def program(path: Path, *lines: str) -> str:
    """Write a program that build.sh can call as one word."""
    path.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    path.chmod(0o755)
    return str(path)


def zig(target: str, work: Path) -> str:
    pip_install(PLACE / "zig", "ziglang")
    path = f'PYTHONPATH="{PLACE / "zig"}"'
    return program(work / "zig", f'{path} exec "{sys.executable}" -m ziglang cc -target {target} "$@"')


def older(name: str, packages: list[str], work: Path) -> str:
    """Return a compiler of this name: the installed one, else that of an older Debian, unpacked in build/."""
    if shutil.which(name):
        return name
    root, lists = PLACE / f"{SUITE}-{name}", PLACE / SUITE
    if not root.exists():
        need("apt-get", "dpkg-deb")
        targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
        mirrors = output_of(*targets).splitlines()
        if not mirrors:
            raise NotRunError(f"no {name}, and no mirror of Debian")
        for folder in ("lists/partial", "cache/archives/partial", "debs"):
            (lists / folder).mkdir(parents=True, exist_ok=True)
        key = "/usr/share/keyrings/debian-archive-keyring.gpg"
        source = f"Types: deb\nURIs: {mirrors[0]}\nSuites: {SUITE}\nComponents: main\nSigned-By: {key}\n"
        (lists / "list.sources").write_text(source)
        own = {  # the system's lists stay as they are
            "Dir::Etc::sourcelist": lists / "list.sources", "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": lists / "lists",
            "Dir::State::status": "/dev/null", "Dir::Cache": lists / "cache", "APT::Sandbox::User": "root",
        }  # fmt: skip
        apt = ["apt-get", "-qq", *(a for k, v in own.items() for a in ("-o", f"{k}={v}"))]
        try:
            output_of(*apt, "update")
            output_of(*apt, "download", *packages, cwd=work)
        except FailedError as e:
            raise NotRunError(f"no {name}, and Debian {SUITE} does not give it: {e}") from None
        for deb in work.glob("*.deb"):
            output_of("dpkg-deb", "-x", deb, root)
    version = name.split("-")[1]
    if name.startswith("gcc"):
        return str(root / "usr/bin" / name)
    llvm = root / f"usr/lib/llvm-{version}"
    libraries = f"{llvm}/lib:{root}/usr/lib/x86_64-linux-gnu"
    return program(work / name, f'LD_LIBRARY_PATH="{libraries}" exec "{llvm}/bin/clang" "$@"')


def sentence(error: FailedError) -> str:
    return str(error)


# -- the core ----------------------------------------------------------------------------------------


def core(compiler: str, flags: list[str], emulator: list[str], work: Path) -> str:
    """Build the core's tests and run them in their brief form. Return how many checks passed on what."""
    exe = work / ("test_core.exe" if emulator[:1] == ["wine"] else "test_core")
    output_of(ROOT / "tests/core/build.sh", exe, compiler, *flags)
    text = output_of(*emulator, exe, ROOT / "tests/core/digests.txt", "--brief", WINEPREFIX=str(PLACE / "wine"))
    sets = ", ".join(re.findall(r"^ran (\w+)", text, re.MULTILINE))
    passed = re.search(r"^(\d+) passed, 0 failed", text, re.MULTILINE)
    if passed is None or not sets:
        raise FailedError(text.splitlines()[-1])
    return f"passed: {int(passed.group(1)):,} checks on {sets}"


def native(name: str, packages: tuple[str, ...] = ()) -> Check:
    return Check("Linux x86-64", name, "core", lambda work: core(older(name, list(packages), work), [], [], work))


def emulated(platform: str, gcc: str, emulator: list[str], *flags: str) -> Check:
    def run(work: Path) -> str:
        need(f"{gcc}-gcc", *emulator[:1])
        return core(f"{gcc}-gcc", list(flags), emulator, work)

    title = " ".join(["gcc", *(f"`{f}`" for f in flags if f.startswith(("-m", "-f")))])
    return Check(platform, title, "core" + (", under qemu" if emulator[0].startswith("qemu") else ""), run)


def refused(platform: str, gcc: str, *flags: str) -> Check:
    """Return a check that building stops with one of the sentences of port.h."""

    def run(work: Path) -> str:
        need(f"{gcc}-gcc")
        command = [f"{gcc}-gcc", "-std=c11", *flags, f"-I{ROOT / 'qins_ext'}", "-c", ROOT / "qins_ext/tables.c"]
        done = subprocess.run([*command, "-o", work / "tables.o"], capture_output=True, text=True)
        said = re.search(r'#error "(.*?)"', done.stderr)
        if done.returncode == 0 or said is None:
            raise FailedError(
                "built, although its codes would be others" if done.returncode == 0 else done.stderr[-300:]
            )
        return f"refused at build time: “{said.group(1)}”"

    return Check(platform, " ".join(["gcc", *(f"`{f}`" for f in flags)]), "core", run)


def mingw(work: Path) -> str:
    need("x86_64-w64-mingw32-gcc-posix", "wine")
    # the C library's isfinite is a macro that converts to float
    return core("x86_64-w64-mingw32-gcc-posix", ["-static", "-Wno-float-conversion"], ["wine"], work)


# isfinite, as above; and a warning of later versions of clang than others have
ZIG_FLAGS = ["-Wno-float-conversion", "-Wno-enum-float-conversion"]


def zig_windows(work: Path) -> str:
    compiler = zig("x86_64-windows-gnu", work)
    need("wine")
    return core(compiler, ZIG_FLAGS, ["wine"], work)


def compiled_core(target: str) -> Callable[[Path], str]:
    def run(work: Path) -> str:
        output_of(ROOT / "tests/core/build.sh", work / "test_core", zig(target, work), *ZIG_FLAGS)
        return "compiled and linked; NOT RUN: no such system here"

    return run


# -- the extension -----------------------------------------------------------------------------------


NUMPY_WHEELS = {"windows": "win_amd64", "macos": "macosx_14_0_x86_64"}


def headers(system: str, work: Path) -> list[str]:
    """Return flags for headers: NumPy's are those of its wheel for the system, Python's are this Python's.

    For Windows, they get another pyconfig.h.
    """
    own = work / "include"
    shutil.copytree(sysconfig.get_path("include"), own)
    if system == "windows":
        shutil.copy(ROOT / "tests/trust/windows/pyconfig.h", own)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    there = PLACE / f"numpy-{NUMPY_WHEELS[system]}-{version}"
    if not there.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        where = ["--platform", NUMPY_WHEELS[system], "--python-version", version, "--target", str(there)]
        output_of(*pip, *where, "-c", ROOT / "constraints.txt", "numpy")
    return [f"-I{own}", f"-I{there / 'numpy/_core/include'}"]


def extension(system: str, compiler: Callable[[Path], str], nm: str = "", dlltool: str = "") -> Callable[[Path], str]:
    """Return a check that compiles and links the whole extension as setup.py would."""

    def run(work: Path) -> str:
        cc = compiler(work)
        flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-format"]
        flags += headers(system, work)
        objects = []
        for source in sorted((ROOT / "qins_ext").glob("*.c")):
            objects.append(work / f"{source.stem}.o")
            output_of(cc, *flags, f"-I{ROOT / 'qins_ext'}", "-c", source, "-o", objects[-1])
        if system == "macos":
            output_of(cc, "-shared", "-undefined", "dynamic_lookup", "-o", work / "_core.so", *objects)
            return "compiled and linked; NOT RUN: no such system here"
        # the names that Python would give; any other that is missing fails
        missing = set(re.findall(r"\bU (?:__imp_)?(_?Py\w+)", output_of(nm, *objects)))
        dll = f"python{sys.version_info[0]}{sys.version_info[1]}.dll"
        (work / "python.def").write_text("\n".join([f"LIBRARY {dll}", "EXPORTS", *sorted(missing)]) + "\n")
        output_of(dlltool, "-d", work / "python.def", "-l", work / "libpython.a", cwd=work)
        output_of(cc, "-shared", "-o", work / "_core.pyd", *objects, f"-L{work}", "-lpython")
        return f"compiled and linked with {len(missing)} names from {dll}; NOT RUN: no Python for Windows here"

    return run


def mingw_compiler(work: Path) -> str:
    need("x86_64-w64-mingw32-gcc-posix", "x86_64-w64-mingw32-nm", "x86_64-w64-mingw32-dlltool")
    return "x86_64-w64-mingw32-gcc-posix"


def setup_refuses(what: str, patch: str) -> Callable[[Path], str]:
    """Return a check that setup.py stops where Python says that the machine is such a one."""

    def run(work: Path) -> str:
        run = "sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
        code = f"import sys, runpy, numpy, setuptools; {patch}; {run}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
        if done.returncode == 0 or "qins" not in last:
            raise FailedError(f"setup.py does not refuse {what}")
        return f"refused at build time: “{last}”"

    return run


# -- versions ----------------------------------------------------------------------------------------


def python_suite(version: str, numpy: str = "") -> Callable[[Path], str]:
    def run(work: Path) -> str:
        text = output_of(
            ROOT / "tests/pythons.sh", version, NUMPY=numpy, PIP=str(Path(sys.executable).with_name("pip"))
        )
        missing = re.search(r"NOT RUN: (CPython .*)", text)
        if missing:
            raise NotRunError(missing.group(1))
        return counts(text)

    return run


def counts(text: str) -> str:
    found = re.findall(r"^.*\b\d+ passed.*$", text, re.MULTILINE)
    if not found:
        raise FailedError("no test ran")
    return "passed: " + re.sub(r"=+| in [\d.]+s.*|, \d+ (?:deselected|warnings?)", "", found[-1]).strip().replace(
        " passed", " tests", 1
    )


def torch_suite(version: str) -> Callable[[Path], str]:
    def run(work: Path) -> str:
        here = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
        ).stdout.strip()
        python = Path(sys.executable)
        if here.split("+")[0] != version:
            place = PLACE / f"torch-{version}-{sys.version_info[0]}.{sys.version_info[1]}"
            python = place / "bin/python"
            if not place.exists():
                output_of(sys.executable, "-m", "venv", place)
                packages = [f"torch=={version}", "numpy", "pytest", "hypothesis", "ml_dtypes", "safetensors"]
                try:
                    output_of(python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages)
                except FailedError as e:
                    shutil.rmtree(place)
                    raise NotRunError(f"cannot be installed: {e}") from None
        tests = ["--room", "nn", "--first", "-m", "not slow and not long", "tests/nn"]
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]  # warnings are torch's own
        return counts(output_of(*pytest, *tests, PYTHONPATH=str(ROOT / "python")))

    return run


SSE = ("-msse2", "-mfpmath=sse")
BIG = "Linux s390x (big-endian)"
PYTHON = f"CPython {sys.version_info[0]}.{sys.version_info[1]}"
CHECKS = [
    *(native(c) for c in ("gcc-12", "gcc-11")),
    native("gcc-10", ("gcc-10", "cpp-10", "libgcc-10-dev")),
    native("gcc-9", ("gcc-9", "cpp-9", "libgcc-9-dev")),
    *(native(c) for c in ("clang-19", "clang-16", "clang-14", "clang-13")),
    native("clang-9", ("clang-9", "libclang-cpp9", "libllvm9", "libclang-common-9-dev", "libffi7", "libz3-4")),
    Check("Windows x86-64", "gcc (mingw-w64)", "core, under wine", mingw),
    Check("Windows x86-64", "clang (zig)", "core, under wine", zig_windows),
    Check("Windows x86-64", "gcc (mingw-w64)", "extension", extension(
        "windows", mingw_compiler, "x86_64-w64-mingw32-nm", "x86_64-w64-mingw32-dlltool")),
    Check("Windows arm64", "clang (zig)", "core", compiled_core("aarch64-windows-gnu")),
    *(check for processor, target in (("x86-64", "x86_64-macos"), ("arm64", "aarch64-macos")) for check in (
        Check(f"macOS {processor}", "clang (zig)", "core", compiled_core(target)),
        Check(f"macOS {processor}", "clang (zig)", "extension", extension("macos", lambda w, t=target: zig(t, w))),
    )),
    emulated("Linux AArch64", "aarch64-linux-gnu", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
    refused(BIG, "s390x-linux-gnu"),
    refused(BIG, "s390x-linux-gnu", "-fexcess-precision=fast"),
    emulated("Linux armhf (32-bit)", "arm-linux-gnueabihf", ["qemu-arm", "-L", "/usr/arm-linux-gnueabihf"]),
    # an x86-64 processor runs it without qemu
    emulated("Linux i386 (32-bit)", "i686-linux-gnu",
             ["/usr/i686-linux-gnu/lib/ld-linux.so.2", "--library-path", "/usr/i686-linux-gnu/lib"], *SSE),
    refused("Linux i386 (32-bit)", "i686-linux-gnu"),
    Check("any big-endian", "", "`pip install`", setup_refuses("big-endian machines", "sys.byteorder = 'big'")),
    Check("any 32-bit", "", "`pip install`", setup_refuses("32-bit machines", "sys.maxsize = 2**31 - 1")),
    *(Check(f"CPython {v}", "gcc", "wheel, NumPy suite", python_suite(v)) for v in PYTHONS),
    *(Check(f"NumPy {v}", "CPython 3.11", "NumPy suite", python_suite("3.11", v)) for v in NUMPYS),
    *(Check(f"torch {v}", PYTHON, "tests of `nn`", torch_suite(v)) for v in TORCHES),
]  # fmt: skip


def write(rows: dict[str, str]) -> None:
    """Put rows in the place of the page's earlier ones; keep those of checks that did not run this time."""
    before, table, after = re.split(f"(?<={BEGIN}\n)|(?={END})", PAGE.read_text())
    old = {" | ".join(line.split("|")[1:4]): line for line in table.splitlines() if line.startswith("|")}
    lines = ["| platform | compiler | what ran | outcome |", "|---|---|---|---|"]
    for check in CHECKS:
        row = rows.get(check.row(""))
        row = row or old.get(" | ".join(check.row("").split("|")[1:4]))
        lines.append(row or check.row("not run yet"))
    PAGE.write_text(before + "\n".join(["", *lines, "", ""]) + after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="NAME")
    parser.add_argument("--write", action="store_true", help=f"renew the rows of {PAGE.name}")
    arguments = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    rows, failed = {}, 0
    for check in CHECKS:
        name = check.row("")
        if arguments.words and not any(word.lower() in name.lower() for word in arguments.words):
            continue
        with tempfile.TemporaryDirectory() as work:
            try:
                outcome = check.run(Path(work))
            except NotRunError as e:
                outcome = f"NOT RUN: {e}"
            except FailedError as e:
                outcome, failed = f"FAILED: {e}", failed + 1
            except subprocess.TimeoutExpired:
                outcome, failed = "FAILED: time limit", failed + 1
        rows[name] = check.row(outcome.replace("|", "/"))
        print(rows[name], flush=True)
        if arguments.write:
            write(rows)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
