"""A `qins serve` process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def start(model: str | Path, *options: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Start a server of one thread; return it and the lines that it prints: what it serves, its URL, a curl command."""
    command = [sys.executable, "-m", "qins.cli", "serve", str(model), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    while "SIGTERM" not in (line := process.stdout.readline()):
        assert line, f"it ended with {process.wait()}"
        lines.append(line.strip())
    return process, lines
