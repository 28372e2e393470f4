"""Print the test files of what changed: since a commit, HEAD by default, or not committed yet.

A test file is of a module if it is named after it, or imports it.
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
    """Modules of the package that a file imports, such as "linear" for qins.linear."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("qins.") for a in node.names if a.name.startswith("qins.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "qins":
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qins."):
            found.add(str(node.module).removeprefix("qins."))
    return found


def main(since: str = "HEAD") -> None:
    changed = changed_files(since)
    modules = {Path(f).stem.strip("_") for f in changed if f.startswith("python/") and f.endswith(".py")}
    if any(f.startswith("qins_ext/") for f in changed):
        modules |= {"array", "linear"}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        name = path.stem.removeprefix("test_")
        mine = {name, *(m.strip("_") for m in imported_modules(path))}
        if f"tests/{path.name}" in changed or mine & modules:
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(*sys.argv[1:])
