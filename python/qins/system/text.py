"""Reading text and JSON files, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .naming import naming_file


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        ValueError: it holds something else.

    """
    try:
        with naming_file(path):
            value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_text(path: str | Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: it is not UTF-8.

    """
    try:
        with naming_file(path):
            return Path(path).read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: expected a text file in UTF-8: {e}") from None
