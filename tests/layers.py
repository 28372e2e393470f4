"""The levels of the package's rooms, highest first, as pyproject.toml gives them to import-linter."""

import ast
from pathlib import Path

_TEXT = (Path(__file__).parents[1] / "pyproject.toml").read_text()  # Python 3.10 has no tomllib
_LINE = next(line for line in _TEXT.splitlines() if line.startswith("layers = "))
LEVELS: list[list[str]] = [level.split(" | ") for level in ast.literal_eval(_LINE.removeprefix("layers = "))]


def above(room: str) -> set[str]:
    """Return the rooms that this one may not import."""
    at = next(i for i, level in enumerate(LEVELS) if room in level)
    return {other for level in LEVELS[:at] for other in level}
