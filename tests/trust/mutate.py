"""Mutation testing: one small change at a random place, then the tests that should notice it.

    mutate.py core 100 --seed 1      mutants of the C core
    mutate.py package 100 --seed 1   mutants of the Python package

Mutants live in a copy of the sources. The core's tests kill a mutant of the core, else those of the room `codec`; a
mutant of the package is killed by the tests that enter its function, which one run of all tests in an instrumented copy
finds, else by tests with several parameters in files whose tests enter its module. `--entered` keeps what that run
found; a later call runs only tests that are new there. Mutants that do not compile, or to the same code, are drawn
again, and counted. Prints a line per mutant. `--out` keeps them as JSON lines, from which a later call with the same
seed goes on. Exits with 1 if a mutant survived that survivors.json does not explain.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import entered
import numpy
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Seconds of one run of tests; a mutant that takes longer is killed. Of each process's processor, and by the clock, for
# those that only wait.
TIME_LIMIT = 1200
# Seconds of the tests that enter a mutant's function, as all could be most of the suite. Its own room's come first.
ENOUGH = 240
EXPLAINED = ROOT / "tests/trust/survivors.json"

# What an operator becomes.
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
ARITHMETIC = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "<<": ">>", ">>": "<<", "&": "|", "|": "&"}
LOGIC = {"&&": "||", "||": "&&", "+=": "-=", "-=": "+=", "|=": "&="}


@dataclass(frozen=True)
class Mutant:
    file: str  # relative to the project
    line: int
    column: int
    kind: str
    before: str  # the line or the statement
    after: str
    source: str  # the whole mutated file; not recorded
    outcome: str = ""  # killed by ..., survived, same code, does not compile

    def record(self) -> dict[str, object]:
        return {k: v for k, v in asdict(self).items() if k != "source"}


# -- C -----------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""(?P<skip>/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\])+')
    |(?P<number>0[xX][0-9a-fA-F.]+(?:[pP][+-]?\d+)?[uUlLfF]*|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[uUlLfF]*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<op><<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)
    |\s+""",
    re.VERBOSE | re.DOTALL,
)
DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
STATEMENT = re.compile(
    r"^[ ]{4,}(?!return\b|case\b|default\b|goto\b|break\b|else\b|const\b)[\w*(][^;{}\n]*;$", re.MULTILINE
)
DECLARATION = re.compile(r"^\s*(?:static\s+)?(?:struct\s+)?[A-Za-z_]\w*\s+\**\w+\s*(?:\[.*\])?\s*(?:=|;|,)")
TYPES = {"char", "int", "unsigned", "float", "double", "void", "long", "short", "const", "size_t", "sizeof", "return"}


def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def other_number(text: str, step: int) -> str | None:
    body = text.rstrip("uUlL")
    if re.fullmatch(r"\d+", body):
        return str(int(body) + step if int(body) + step >= 0 else int(body) + 1) + text[len(body) :]
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", body):
        return hex(max(int(body, 16) + step, 0)) + text[len(body) :]
    if re.fullmatch(r"\d+\.\d*(?:[eE][+-]?\d+)?[fF]?", text):
        return f"({text} + {step}.0f)" if text[-1] in "fF" else f"({text} + {step}.0)"
    return None


def is_binary(before: str) -> bool:
    """Return whether an operator after this token has a left operand."""
    return bool(before) and before not in TYPES and (before[-1].isalnum() or before[-1] in "_)]")


def closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError("unbalanced parentheses")


def c_places(text: str) -> list[tuple[str, int, int, str]]:
    """Return all changes of a C file: kind, begin, end, and what comes there."""
    plain = DIRECTIVE.sub(blank, re.sub(r"/\*.*?\*/", blank, text, flags=re.DOTALL))
    places = []
    before = ""
    for t in TOKEN.finditer(plain):
        begin, end, token = t.start(), t.end(), t.group()
        if t.lastgroup == "op":
            if token in COMPARISONS:
                places.append(("comparison", begin, end, COMPARISONS[token]))
            elif token in LOGIC:
                places.append(("logic", begin, end, LOGIC[token]))
            # a declared pointer, and a cast, has a type before it
            elif (
                token in ARITHMETIC
                and is_binary(before)
                and not re.search(r"(_t|_\w+|vf|vi)$", before * (token == "*"))
            ):
                places.append(("arithmetic", begin, end, ARITHMETIC[token]))
        elif t.lastgroup == "number":
            for step in (1, -1):
                number = other_number(token, step)
                if number is not None:
                    places.append(("constant", begin, end, number))
        elif token == "if":
            opening = plain.index("(", end)
            last = closing(plain, opening)
            places.append(("branches", opening, last + 1, f"(!{text[opening : last + 1]})"))
        if t.lastgroup in ("op", "number", "name"):
            before = token
    for s in STATEMENT.finditer(plain):
        if not DECLARATION.match(s.group()):
            begin = s.start() + len(s.group()) - len(s.group().lstrip())
            places.append(("deleted", begin, s.end(), ";"))
    return places


def line_at(text: str, at: int) -> str:
    return text[text.rfind("\n", 0, at) + 1 : (text + "\n").index("\n", at)].strip()


class Core:
    """The core and its tests, built from a copy. Objects of files without a mutant are kept."""

    def __init__(self, place: Path):
        self.place = place
        for folder in ("qins_ext", "tests", "python"):
            shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", place)
        self.source = place / "qins_ext"
        self.list_of_sets = (self.source / "isas.def").read_text()
        self.all_sets = re.findall(r"^X\((\w+)", self.list_of_sets, re.MULTILINE)
        here = subprocess.run(
            [sys.executable, "-c", "import qins; print(*qins.isas())"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        self.sets = [name for name in self.all_sets if name in here]
        self.objects = place / "objects"
        self.objects.mkdir()
        self.built: list[str] = []  # sets
        self.includes = {p.name: self._included(p) for p in self.source.iterdir()}

    def _included(self, path: Path) -> set[str]:
        return set(re.findall(r'#\s*include "([^"]+)"', path.read_text()))

    def needs(self, unit: str, file: str) -> bool:
        """Return whether a file is part of a translation unit."""
        todo, seen = [unit], set()
        while todo:
            name = todo.pop()
            if name == file:
                return True
            if name not in seen:
                seen.add(name)
                todo += self.includes.get(name, ())
        return False

    def files(self) -> list[str]:
        """Files of the core that are compiled here."""
        foreign = {f"isa_{n}.c" for n in self.all_sets if n not in self.sets}
        ours = [
            n for n in self.includes if n.endswith(".c") and not n.startswith(("module", "args")) and n not in foreign
        ]
        return sorted(n for n in self.includes if not n.endswith(".def") and any(self.needs(u, n) for u in ours))

    def sets_for(self, file: str) -> list[str]:
        """Return the sets to build: of those whose units have the file the best and the scalar one, else all."""
        with_file = [n for n in self.sets if self.needs(f"isa_{n}.c", file)]
        return sorted({with_file[0], "scalar"}) if with_file else self.sets

    def build(self, file: str, source: str) -> str:
        """Build with one file changed. Return what makes testing needless, if anything."""
        sets = self.sets_for(file)
        mode = "-".join(sets)
        self.built = sets
        self.write_list(sets)
        left_out = {f"isa_{n}.c" for n in self.all_sets if n not in sets}
        units = [p for p in sorted(self.source.glob("*.c")) if p.name not in left_out]
        units += sorted((self.place / "tests/core").glob("*.c"))
        if not (self.objects / mode).exists():
            for unit in units:
                if not self._compile(unit, mode, "original"):
                    raise RuntimeError(f"{unit.name} does not compile")
            self._link(units, [], mode)
            if failure := self.test_core() or self.test_package():
                raise RuntimeError(f"the tests fail without a mutant: {failure}")
        changed = [u for u in units if self._is_part(file, u)]
        (self.source / file).write_text(source)
        try:
            compiled = all(self._compile(u, mode, "mutant") for u in changed)
        finally:
            shutil.copy(ROOT / "qins_ext" / file, self.source / file)
        if not compiled:
            return "does not compile"
        pairs = [(self._object(u, mode, "mutant"), self._object(u, mode, "original")) for u in changed]
        if all(a.read_bytes() == b.read_bytes() for a, b in pairs):
            return "same code"
        self._link(units, changed, mode)
        return ""

    def write_list(self, sets: list[str]) -> None:
        """Leave only some instruction sets in the list."""
        text = re.sub(
            r"^X\((\w+), \w+",
            lambda m: m.group() if m.group(1) in sets else f"X({m.group(1)}, 0",
            self.list_of_sets,
            flags=re.M,
        )
        (self.source / "isas.def").write_text(text)

    def _link(self, units: list[Path], changed: list[Path], mode: str) -> None:
        objects = [self._object(u, mode, "mutant" if u in changed else "original") for u in units]
        glue = [o for o in objects if o.name.startswith(("module", "args"))]
        tests = [o for o in objects if o.name.startswith("test_")]
        core = [o for o in objects if o not in glue and o not in tests]
        link = ["gcc", "-pthread", "-o"]
        subprocess.run([*link, self.place / "test_core", *core, *tests, "-lm"], check=True)
        subprocess.run([*link, self.place / "python/qins/_core.so", "-shared", *core, *glue, "-lm"], check=True)

    def _is_part(self, file: str, unit: Path) -> bool:
        included = [unit.name] if unit.parent == self.source else self._included(unit)
        return any(self.needs(n, file) for n in included)

    def _object(self, unit: Path, mode: str, which: str) -> Path:
        return self.objects / mode / which / f"{unit.stem}.o"

    def _compile(self, unit: Path, mode: str, which: str) -> bool:
        out = self._object(unit, mode, which)
        out.parent.mkdir(parents=True, exist_ok=True)
        # the scalar set takes a fifth of the time at -O0, but then the tests take longer: only where mutants change it
        level = "-O1" if unit.name != "isa_scalar.c" else "-O2" if mode == "-".join(self.sets) else "-O0"
        how = [level, "-fPIC", "-ffp-contract=off", "-w"]
        folders = ["qins_ext", "tests/core", sysconfig.get_path("include"), numpy.get_include()]
        command = ["gcc", "-std=c11", "-D_GNU_SOURCE", *how, *(f"-I{f}" for f in folders)]
        # relative paths, so that a compiler cache knows what another copy compiled
        paths = ["-c", unit.relative_to(self.place), "-o", out.relative_to(self.place)]
        return subprocess.run([*command, *paths], cwd=self.place, capture_output=True).returncode == 0

    def test_core(self) -> str:
        """Return which of the core's tests fails, or nothing."""
        line_by_line = ["stdbuf", "-oL"] if shutil.which("stdbuf") else []
        tests = [*line_by_line, str(self.place / "test_core"), str(ROOT / "tests/core/digests.txt")]
        # first the best set alone, which kills most mutants in seconds; some need shapes that only the whole tests have
        failure = fails([*tests, "--best"], self.place) or fails(tests, self.place)
        return failure and f"the core's tests ({failure})"

    def test_package(self) -> str:
        """Return what fails of the package's tests that are nearest to the core, or nothing."""
        cache = ["tests/nn/test_kv_cache.py"]  # the codec of KV caches has its tests there
        whole = [] if self.built == self.sets else ["--ignore=tests/codec/test_instruction_sets.py"]
        return fails_pytest(self.place, ["tests/codec"], "--first", *whole) or fails_pytest(self.place, cache)

    def outcome(self, mutant: Mutant) -> str:
        stopped = self.build(Path(mutant.file).name, mutant.source)
        if stopped:
            return stopped
        failure = self.test_core() or self.test_package()
        return f"killed by {failure}" if failure else "survived"


def c_mutant(file: str, text: str, place: tuple[str, int, int, str]) -> Mutant:
    kind, begin, end, new = place
    source = text[:begin] + new + text[end:]
    line, column = text.count("\n", 0, begin) + 1, begin - text.rfind("\n", 0, begin)
    return Mutant(file, line, column, kind, line_at(text, begin), line_at(source, begin), source)


# -- Python ------------------------------------------------------------------------------------------

PY_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
PY_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def changes_of(node: ast.AST) -> list[tuple[str, Callable[[ast.AST], ast.AST]]]:
    """Return the changes that a node allows: kind, and a function from a copy of the node to another node."""
    found: list[tuple[str, Callable[[ast.AST], ast.AST]]] = []
    if isinstance(node, ast.Compare) and type(node.ops[0]) in PY_COMPARISONS:
        found.append(("comparison", lambda n: set_field(n, "ops", [PY_COMPARISONS[type(n.ops[0])](), *n.ops[1:]])))
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in PY_ARITHMETIC:
        found.append(("arithmetic", lambda n: set_field(n, "op", PY_ARITHMETIC[type(n.op)]())))
    elif isinstance(node, ast.BoolOp):
        found.append(("logic", lambda n: set_field(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        found.append(("constant", lambda n: set_field(n, "value", not n.value)))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        found.append(("constant", lambda n: set_field(n, "value", n.value + 1)))
        found.append(("constant", lambda n: set_field(n, "value", n.value - 1)))
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        found.append(("branches", lambda n: set_field(n, "test", ast.UnaryOp(ast.Not(), n.test))))
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Raise) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant | ast.Yield | ast.YieldFrom)
    ):
        found.append(("deleted", lambda n: ast.copy_location(ast.Pass(), n)))
    return found


def set_field(node: ast.AST, field: str, value: object) -> ast.AST:
    setattr(node, field, value)
    return node


def py_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes of functions: not of annotations, and not of the module's own level, which defines names."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped = [function.args, *function.decorator_list]
            skipped += [function.returns] if function.returns else []
            skipped += [n.annotation for n in ast.walk(function) if isinstance(n, ast.AnnAssign)]
            skipped += [
                n
                for n in ast.walk(function)
                if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n is not function
            ]
            hidden = {id(n) for s in skipped for n in ast.walk(s)}
            yield from (n for n in ast.walk(function) if id(n) not in hidden and n is not function)


class Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, new: ast.AST):
        self.target, self.new = target, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.target else super().generic_visit(node)


def py_mutant(file: str, tree: ast.Module, node: ast.AST, kind: str, change: Callable[[ast.AST], ast.AST]) -> Mutant:
    line, column = getattr(node, "lineno", 0), getattr(node, "col_offset", -1) + 1
    before = ast.unparse(node)
    new = change(copy.deepcopy(node))
    mutated = ast.fix_missing_locations(Replace(node, new).visit(tree))
    after, source = ast.unparse(new), ast.unparse(mutated) + "\n"
    return Mutant(file, line, column, kind, before.split("\n")[0], after.split("\n")[0], source)


def copy_project(place: Path) -> None:
    for folder in ("qins_ext", "tests", "python", "benchmarks", "docs"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, place)


class Package:
    def __init__(self, place: Path, record: Path):
        self.place = place
        copy_project(place)
        # a test's name without parameters: how many it has; and its name with the first ones
        tests = self.collect()
        self.variants = Counter(t.partition("[")[0] for t in tests)
        first = list({t.partition("[")[0]: t for t in reversed(tests)}.values())[::-1]
        known = {r["test"] for r in read_lines(record)}
        if missing := [t for t in first if t not in known]:
            self.find_entered(missing, record)
        self.tests = [r for r in read_lines(record) if r["test"] in first]
        if len(self.tests) < 0.9 * len(first):
            raise RuntimeError(f"{record}: expected what {len(first)} tests enter, got {len(self.tests)}")

    def collect(self) -> list[str]:
        """Return the tests of the rooms."""
        rooms = [d.parent.name for d in sorted((ROOT / "python/qins").glob("*/__init__.py"))]
        rooms = [name for name in rooms if (ROOT / "tests" / name).is_dir()]
        command = [*PYTEST, "--collect-only", *(f"tests/{name}" for name in rooms)]
        output = subprocess.run(command, cwd=self.place, env=environment(self.place), capture_output=True, text=True)
        if output.returncode != 0:
            raise RuntimeError(f"collecting tests failed: {output.stdout[-2000:]}{output.stderr[-2000:]}")
        return re.findall(r"^tests/\S+::.*$", output.stdout, re.MULTILINE)

    def find_entered(self, tests: list[str], record: Path) -> None:
        """Append to the record what these tests enter: some minutes."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            copy_project(place)
            entered.instrument(place, self.files())
            settings = {**environment(place), "QINS_ENTERED": str(record.absolute())}
            command = [*PYTEST, "--maxfail=0", "-p", "entered", *tests]
            subprocess.run(command, cwd=place, env=settings, stdout=subprocess.DEVNULL)

    def files(self) -> list[str]:
        return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "python/qins").glob("*/*.py"))

    def tests_entering(self, file: str, line: int) -> tuple[list[str], float]:
        """Return the tests that enter the function of a line, and about their seconds."""
        function = f"{file}:{entered.function_at((ROOT / file).read_text(), line)}"
        return self._fastest(file, {r["test"]: r["seconds"] for r in self.tests if function in r["entered"]})

    def tests_of_module(self, file: str) -> tuple[list[str], float]:
        """Return the tests with several parameters in files whose tests enter a module, and about their seconds."""
        files = {
            r["test"].partition("::")[0] for r in self.tests if any(f.startswith(f"{file}:") for f in r["entered"])
        }
        found = {}
        for r in self.tests:
            name = r["test"].partition("[")[0]
            if self.variants[name] > 1 and name.partition("::")[0] in files:
                found[name] = r["seconds"] * self.variants[name]
        return self._fastest(file, found)

    def _fastest(self, file: str, tests: dict[str, float]) -> tuple[list[str], float]:
        """Return the fastest of these tests, by file, and the sum of their seconds; those of the room come first."""
        room = f"tests/{Path(file).parent.name}/"
        total, files = 0.0, {}
        for name in sorted(tests, key=lambda t: (not t.startswith(room), tests[t])):
            if total + tests[name] < ENOUGH or not files:
                total += tests[name]
                files.setdefault(name.partition("::")[0], []).append(name)
        order = sorted(files, key=lambda f: (not f.startswith(room), sum(tests[t] for t in files[f])))
        return [t for f in order for t in files[f]], total

    def outcome(self, mutant: Mutant) -> str:
        path = self.place / mutant.file
        original, failure = (ROOT / mutant.file).read_text(), ""
        if same_code(original, mutant.source):
            return "same code"
        path.write_text(mutant.source)
        try:
            for tests, seconds in (
                self.tests_entering(mutant.file, mutant.line),
                self.tests_of_module(mutant.file),
            ):
                failure = failure or fails_pytest(self.place, tests, limit=60 + 4 * seconds)
        finally:
            path.write_text(original)
        return self.confirm(failure) if failure else "survived"

    def confirm(self, failure: str) -> str:
        """Return the outcome of a mutant whose tests failed: a test that fails without it, too, kills nothing."""
        test = re.match(r"(\S+::.*?)(?: - |$)", failure)
        if test and fails_pytest(self.place, [test.group(1)]):
            return f"inconclusive: {failure} fails without the mutant, too"
        return f"killed by {failure}"


def same_code(one: str, other: str) -> bool:
    return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))


# -- running -----------------------------------------------------------------------------------------


PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
    *("-m", "not slow and not long", "-W", "ignore"),
]


def environment(place: Path) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(place / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **ours}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def preload() -> None:
    """Import what most tests need, for `fork_pytest`; what of it is missing, they import themselves or skip."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # which would import qins
    for name in (
        "torch",
        "transformers.models.llama.modeling_llama",
        "transformers.modeling_utils",
        "transformers.generation.utils",
        "safetensors.torch",
        "hypothesis.strategies",
        "rich.table",
        "typer",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]


def limit_processor(seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def fork_pytest(arguments: list[str], place: Path, settings: dict[str, str], output: IO[str], cpu: int) -> int:
    """Start pytest in a fork, which has what this process imported; return its id."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.setsid()
        limit_processor(cpu)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.chdir(place)
        os.environ.update(settings)
        sys.dont_write_bytecode, tempfile.tempdir = True, None  # read from the environment before
        sys.path[:1] = ["", str(place / "python")]  # instead of this file's directory
        if "torch" in sys.modules:
            importlib.import_module("_qins_autoload").install()  # as torch does
        code = int(pytest.main(arguments))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def fails(command: list[str], place: Path, limit: float = TIME_LIMIT) -> str:
    """Run tests, of pytest in a fork. Return how they failed, or nothing if they passed."""
    cpu = round(min(limit, TIME_LIMIT))
    # what a mutant writes beside the tests' directories goes with it
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as output:
        settings = {**environment(place), "TMPDIR": scratch}
        if command[: len(PYTEST)] == PYTEST:
            process = fork_pytest(command[3:], place, settings, output, cpu)
        else:
            child = subprocess.Popen(
                command, cwd=place, env=settings, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=lambda: limit_processor(cpu),
            )  # fmt: skip
            process = child.pid  # `child` is kept: deleting it would wait for the process, too
        begun, code = time.monotonic(), None
        while code is None and time.monotonic() - begun < 4 * cpu:
            time.sleep(0.2)
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                break
            so_far = os.pread(output.fileno(), 1 << 20, 0)  # seeking would move the process, too
            if re.search(b"^FAILED ", so_far, re.MULTILINE):  # the core's tests print each failure, and go on
                code = 1
        if not ended:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        output.seek(0)
        text = output.read()
    if code is None:
        return "time limit"
    first = re.search(r"^(?:FAILED|ERROR) (\S.*)$", text, re.MULTILINE)
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and first is None:
        return "time limit"
    return "" if code == 0 else first.group(1)[:200] if first else f"exit status {code}"


def fails_pytest(place: Path, tests: list[str], *options: str, limit: float = TIME_LIMIT) -> str:
    return fails([*PYTEST, *options, *tests], place, limit).replace("exit status 5", "") if tests else ""


def draw_core(chance: random.Random, core: Core) -> Iterator[Mutant]:
    texts = {f"qins_ext/{n}": (ROOT / "qins_ext" / n).read_text() for n in core.files()}
    places = [(file, place) for file, text in texts.items() for place in c_places(text)]
    # a kind first: constants would be half of all
    kinds = sorted({place[0] for _, place in places})
    while True:
        kind = chance.choice(kinds)
        file, place = chance.choice([p for p in places if p[1][0] == kind])
        yield c_mutant(file, texts[file], place)


def draw_package(chance: random.Random, package: Package) -> Iterator[Mutant]:
    places = []
    for file in package.files():
        tree = ast.parse((ROOT / file).read_text())
        for i, node in enumerate(py_nodes(tree)):
            places += [(kind, file, i, j) for j, (kind, _) in enumerate(changes_of(node))]
    kinds = sorted({p[0] for p in places})
    while True:
        kind = chance.choice(kinds)
        _, file, i, j = chance.choice([p for p in places if p[0] == kind])
        tree = ast.parse((ROOT / file).read_text())
        node = list(py_nodes(tree))[i]
        _, change = changes_of(node)[j]
        yield py_mutant(file, tree, node, kind, change)


def key(record: dict[str, object]) -> tuple[object, ...]:
    return record["file"], record["line"], record["column"], record["kind"], record["before"], record["after"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["core", "package"])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines, appended to; what is there is not run again")
    parser.add_argument("--entered", type=Path, help="JSON lines: which functions of the package each test enters")
    parser.add_argument("--again", action="store_true", help="only what survived according to --out")
    arguments = parser.parse_args()
    known = {key(r): r for r in read_lines(arguments.out)} if arguments.out else {}
    explained = {key(r): r["why"] for r in json.loads(EXPLAINED.read_text())} if EXPLAINED.exists() else {}
    outcomes: Counter[str] = Counter()
    unexplained = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "copy"
        place.mkdir()
        preload()
        record = arguments.entered or Path(folder) / "entered.jsonl"
        subject: Core | Package = Core(place) if arguments.what == "core" else Package(place, record)
        draw = (
            draw_core(random.Random(arguments.seed), subject)
            if isinstance(subject, Core)
            else draw_package(random.Random(arguments.seed), subject)
        )
        seen = set()
        while sum(outcomes[o] for o in ("killed", "survived", "equivalent")) < arguments.count:
            mutant = next(draw)
            identity = key(mutant.record())
            if identity in seen:
                continue
            seen.add(identity)
            record = known.get(identity)
            if record is None or (arguments.again and record["outcome"] == "survived"):
                record = replace(mutant, outcome=subject.outcome(mutant)).record()
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
            outcome = str(record["outcome"])
            if outcome == "survived" and identity in explained:
                outcome = f"equivalent: {explained[identity]}"
            unexplained += outcome == "survived"
            outcomes[outcome.split(" by ")[0].split(":")[0]] += 1
            print(
                f"{mutant.file}:{mutant.line}: {mutant.kind}: {mutant.before}  ->  {mutant.after}\n    {outcome}",
                flush=True,
            )
    print(f"{arguments.what}: " + ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())))
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
