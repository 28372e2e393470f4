"""The command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ImportError:  # pragma: no cover - depends on the environment
    sys.exit("the qins command needs typer and rich: pip install 'qins[cli]'")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """8-bit logarithmic codes for the weights of language models."""


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub name; without it SmolLM2-135M-Instruct, from its package.")
    ] = None,
    codec: Annotated[str, typer.Option(help="log8, log9 or golden.")] = "log8",
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale (log8): default 128; 0 for one scale a row.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of English text to compare on.")] = 2048,
    picture: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("qins-demo.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Quantise a real language model and compare it with its float original."""
    from .demo import run

    size: int | str | None = "default" if group_size is None else group_size or None
    console = Console(stderr=as_json)
    result = run(model, codec, size, tokens, picture, console)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="out_features x in_features of the layer.")] = "8192x3072",
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of activations; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="For each figure.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time one layer on this machine: codes beside torch's float32 and bfloat16, and beside a plain read."""
    from .bench import run

    sizes = shape.lower().split("x")
    if len(sizes) != 2 or not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise ValueError(f"shape: expected OUTxIN, such as 8192x3072, got {shape!r}")
    result = run((int(sizes[0]), int(sizes[1])), rows or [1, 8, 64, 512], seconds)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.table import Table

    about = result["machine"]
    title = f"{shape}, milliseconds; {about['cpu']}, {about['threads']} threads, {about['isas'][0]}"
    table = Table("rows of x", title=title)
    names = list(next(iter(result["milliseconds"].values())))
    for name in [*names, "times float32", "times bfloat16"]:
        table.add_column(name, justify="right")
    for n, times in result["milliseconds"].items():
        float32, bfloat16, from32, from16 = (times[name] for name in names[1:])
        ratios = [f"{float32 / from32:.2f}", f"{bfloat16 / from16:.2f}"]
        table.add_row(str(n), *(f"{times[name]:.3f}" for name in names), *ratios)
    Console().print(table)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A safetensors, torch or GGUF file, or a directory with one model.")],
    against: Annotated[
        Path | None, typer.Option(help="Another checkpoint of the model: prints the error of every layer.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a saved model holds: codecs, dtypes, bytes by kind, compression. Exits with 1 if something is wrong."""
    from . import _torch  # noqa: F401 - says which extra is missing where torch is
    from .inspection import inspect as look

    report = look(path, against)
    typer.echo(report.to_json() if as_json else str(report))
    if report.problems:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit code 1, not a traceback."""
    try:
        app()
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as e:
        Console(stderr=True).print(f"[red]error:[/] {e}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
