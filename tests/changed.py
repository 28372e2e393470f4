"""Print the test files for the changes since a commit (HEAD by default), uncommitted changes included.

A test file belongs to a module if it is in the directory of the module's room and named after it, or imports it by its
full name. Modules that no test file is named after belong to all tests of their room.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lines_of(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()


def changed_files(since: str) -> set[str]:
    return {
        *lines_of("git", "diff", "--name-only", since),
        *lines_of("git", "ls-files", "--others", "--exclude-standard"),
    }


def imported_modules(path: Path) -> set[str]:
    """Return the full names of modules that a file imports, or may import."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def main(since: str = "HEAD") -> None:
    changed = changed_files(since)
    modules = {tuple(Path(f).parts[-2:]) for f in changed if f.startswith("python/") and f.endswith(".py")}
    if any(f.startswith("qins_ext/") for f in changed):
        modules |= {("codec", "array.py"), ("nn", "linear.py")}
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    named = {(p.parent.name, p.name.removeprefix("test_")) for p in tests}
    rooms = {room for room, file in modules if (room, file) not in named}
    full = {f"qins.{room}.{Path(file).stem}" for room, file in modules}
    for path in tests:
        room = path.parent.name
        mine = (room, path.name.removeprefix("test_")) in modules or room in rooms
        if mine or str(path.relative_to(ROOT)) in changed or full & imported_modules(path):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(*sys.argv[1:])
