"""The command line."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from typing import Annotated

from ..system import naming_extras

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ImportError:  # pragma: no cover - depends on the environment
    sys.exit("the qins command needs typer and rich: pip install 'qins[cli]'")

from .converting import inspect, quantize, restore
from .measuring import bench, demo, evaluate
from .noise import noise, split_arguments
from .options import with_addresses
from .serving import serve
from .talking import chat, generate

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__, isas

    typer.echo(f"qins {__version__}")
    typer.echo(f"instruction sets: {', '.join(isas())}")
    for package in ("torch", "transformers"):
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results and errors only; also accepted after the command.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print what the command does, the total time, and library messages."),
    ] = False,
) -> None:
    """Quantize language models to logarithmic codes of 4 to 8 bits, and run them on CPUs."""


# the help lists commands in this order
app.command()(demo)
app.command()(bench)
app.command()(inspect)
app.command()(quantize)
app.command()(restore)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)
app.command()(serve)


_received: list[int] = []  # signals that end the process


def _end(number: int, frame: object) -> None:
    """End as a shell does that a signal ended; unlike SIGTERM's default, this deletes temporary files."""
    _received.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def main() -> None:
    """Run the command line; a user error is one line on stderr and exit code 1, not a traceback."""
    # Python looks for garbage in all that torch and transformers make, when they are imported and once more at its end:
    # a tenth of the time until a model answers, and a second
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as it is after nohup
        signal.signal(signal.SIGINT, _end)
    quiet, verbose, arguments = split_arguments(sys.argv[1:])
    try:
        with naming_extras(), noise(quiet, verbose):
            app(with_addresses(arguments))
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as e:
        if _received:  # torch replaces what a signal's handler raises within its calls by errors of its own
            sys.exit(128 + _received[-1])
        told = str(e) or "out of memory"
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(told)}", highlight=False)
        sys.exit(1)
