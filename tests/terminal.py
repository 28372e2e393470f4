"""Running the command line in this process."""

from __future__ import annotations

import contextlib
import functools
import io
import subprocess
import sys
from unittest import mock

import pytest
import typer.main
from typer.testing import CliRunner

from qins import cli

# each call of the command line makes all commands anew, which takes a tenth of a second
typer.main.get_command = functools.cache(typer.main.get_command)


def printed(*args, **kwargs):
    """Return what a command that succeeds prints; its errors are raised as they are."""
    result = CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False, **kwargs)
    assert result.exit_code == 0
    return result.stdout


def run(*args):
    """Run a command; return exit code, stdout and stderr as subprocess.run does."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["qins", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as e,
    ):
        cli.main()
    return subprocess.CompletedProcess(sys.argv, e.value.code or 0, out.getvalue(), err.getvalue())


def as_shell(monkeypatch, capfd, *args):
    """Run a command as a shell does; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["qins", *map(str, args)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as e:
        cli.main()
    out, err = capfd.readouterr()
    return e.value.code or 0, out, err
