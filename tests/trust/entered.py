"""Which tests enter which functions of the package: for mutate.py, and a plug-in of pytest for the copy it makes.

`instrument` changes a copy of the package so that each function calls `add` of this file on entry. In that copy,
`-p entered` with QINS_ENTERED naming a file writes one JSON line per test: its name, seconds, and the functions that it
entered, in processes that it started, too. What a fixture of several tests entered counts for each of them.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

# Set for the processes that a test starts, which write what they enter to this file.
LOG = "QINS_ENTERED_LOG"
seen: set[str] = set()


def add(function: str) -> None:
    """Note that a function was entered: at once, for a process that is about to be killed."""
    if function not in seen:
        seen.add(function)
        if LOG in os.environ:
            with open(os.environ[LOG], "a") as log:
                log.write(function + "\n")


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """Yield the functions of a tree, methods and inner ones, too, with their qualified names."""
    for node in ast.iter_child_nodes(tree):
        name = f"{inside}.{node.name}".lstrip(".") if isinstance(node, Function | ast.ClassDef) else inside
        if isinstance(node, Function):
            yield name, node
        yield from functions(node, name)


def function_at(text: str, line: int) -> str:
    """Return the name of the innermost function that has a line."""
    around = [(f.lineno, n) for n, f in functions(ast.parse(text)) if f.lineno <= line <= (f.end_lineno or 0)]
    return max(around)[1]


def instrument(place: Path, files: list[str]) -> None:
    """Make each function of these files note that it was entered, as "file:name"."""
    shutil.copy(__file__, place / "python")
    for file in files:
        tree = ast.parse((place / file).read_text())
        for name, function in list(functions(tree)):
            note = ast.parse(f"__import__('entered').add('{file}:{name}')").body
            first = int(ast.get_docstring(function) is not None)
            function.body[first:first] = note
        (place / file).write_text(ast.unparse(ast.fix_missing_locations(tree)))


# -- the plug-in -------------------------------------------------------------------------------------

try:
    import pytest
except ModuleNotFoundError:  # in a process that a test started with another Python
    pass
else:
    of_fixtures: dict[object, tuple[set[str], float]] = {}  # and how long they took

    def take() -> set[str]:
        """Return what was entered since the last call."""
        log = Path(os.environ[LOG])
        taken = set(log.read_text().split("\n")) - {""} if log.exists() else set()
        log.unlink(missing_ok=True)
        seen.clear()
        return taken

    def pytest_configure() -> None:
        os.environ[LOG] = os.environ["QINS_ENTERED"] + f".{os.getpid()}"

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(fixturedef):
        before, begun = take(), time.monotonic()
        yield
        taken = take()
        of_fixtures[fixturedef] = taken, time.monotonic() - begun
        for function in before | taken:
            add(function)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(item):
        take()
        begun, earlier = time.monotonic(), set(of_fixtures)
        yield
        seconds, entered = time.monotonic() - begun, take()
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            functions, its_seconds = of_fixtures.get(definitions[-1], (set(), 0.0))
            entered |= functions
            seconds += its_seconds if definitions[-1] in earlier else 0.0  # a test that runs alone sets it up
        record = {"test": item.nodeid, "seconds": round(seconds, 3), "entered": sorted(entered)}
        with open(os.environ["QINS_ENTERED"], "a") as file:
            file.write(json.dumps(record) + "\n")
