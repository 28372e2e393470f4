"""`qins demo`, `qins bench` and `qins eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..system import require
from .options import group_size_of


def demo(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub name; without it SmolLM2-135M-Instruct, from its package.")
    ] = None,
    codec: Annotated[str, typer.Option(help="log8, log6, log5, log4, log9 or golden.")] = "log8",
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale: default 64, or 32 (log6, log5, log4); 0: per-row scales (log8)."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Number of tokens of English text to compare on.")] = 2048,
    picture: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("qins-demo.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Quantize a real language model and compare it with its float original."""
    require("torch", "transformers", "matplotlib")
    from .demo import run

    console = Console(stderr=as_json)
    result = run(model, codec, group_size_of(group_size), tokens, picture, console)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


def bench(
    shape: Annotated[str, typer.Option(help="out_features x in_features of the layer.")] = "8192x3072",
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of activations; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, max=3600.0, help="Seconds of timing per figure.")] = 0.4,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale: default 64; 0 for per-row scales.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time one layer on this machine: quantized, in torch's float32 and bfloat16, and a plain read of the codes."""
    from .bench import run

    sizes = shape.lower().split("x")
    if len(sizes) != 2 or not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise ValueError(f"shape: expected OUTxIN, such as 8192x3072, got {shape!r}")
    result = run((int(sizes[0]), int(sizes[1])), rows or [1, 8, 64, 512], seconds, group_size_of(group_size))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.table import Table

    about = result["machine"]
    scales = f"group_size {result['group_size']}" if result["group_size"] else "per-row scales"
    title = f"{shape}, {scales}, milliseconds; {about['cpu']}, {about['threads']} threads, {about['isas'][0]}"
    table = Table("rows of x", title=title)
    names = list(next(iter(result["milliseconds"].values())))
    for name in [*names, "times float32", "times bfloat16"]:
        table.add_column(name, justify="right")
    for n, times in result["milliseconds"].items():
        float32, bfloat16, from32, from16 = (times[name] for name in names[1:])
        ratios = [f"{float32 / from32:.2f}", f"{bfloat16 / from16:.2f}"]
        table.add_row(str(n), *(f"{times[name]:.3f}" for name in names), *ratios)
    Console().print(table)


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub name; without --against, the float original.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The float original that MODEL is measured against.")] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="Variant of the original to make and measure; may be repeated. See above.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Also measure other formats of about 8 bits.")] = True,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; without it, the bundled English text.")] = None,
    tokens: Annotated[int, typer.Option(min=32, help="Maximum number of tokens of that text.")] = 2048,
    window: Annotated[int, typer.Option(min=16, help="Tokens that the models see at a time.")] = 512,
    calibrate: Annotated[
        Path | None, typer.Option(help="Text for 'calibrated'; without it, the part of the text not compared on.")
    ] = None,
    restored: Annotated[
        bool,
        typer.Option(
            "--restored", help="Also measure what MODEL's exact-*.safetensors restore; exit with 1 if it differs."
        ),
    ] = False,
    max_kld: Annotated[
        float | None, typer.Option(help="Exit with 1 if a measured model's mean KL divergence is above this.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file to write, with PNG pictures next to it.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Directory for the original's outputs, to resume from and to reuse.")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Task of lm-eval; may be repeated.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="With --against, answer windows of text on the machines of a Ray cluster, as in `qins quantize`; "
            "--work, MODEL and the original must be on a shared folder.",
        ),
    ] = None,
    ray_cpus: Annotated[float, typer.Option(min=0.01, help="Processors of each worker on the cluster.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure how far a model's outputs are from those of its float original.

    It measures text models: decoders, encoder-decoders (given a piece of text, they predict the next one), masked
    language models (they predict one token in seven) and encoders (compared by cosines of hidden states).

    With --against, it measures MODEL as it is. Without, it makes and measures all variants of MODEL in one run: log8,
    calibrated, 'calibrated to N bits', 'log8 per row', log9, golden, rational, and as peers 'int8 per row', Q8_0,
    'uint8 per 64', 'fp8 e4m3 per row', 'bf16 weights' and 'bf16 model'. On request also log6, log5, log4, and each of
    them after 'calibrated', such as 'calibrated log4'.
    """
    require("torch", "transformers", *(["matplotlib", "jinja2"] if report is not None else []))
    from .. import fidelity
    from ..system import read_text

    settings = fidelity.Settings(
        text=None if text is None else read_text(text),
        tokens=tokens,
        window=window,
        calibration=None if calibrate is None else read_text(calibrate),
        directory=work,
    )
    if against is not None and (model is None or codec):
        raise ValueError("against: expected a MODEL to measure, and no --codec")
    if restored and against is None:
        raise ValueError("restored: expected --against with the original, got none")
    if ray is not None and (against is None or work is None):
        raise ValueError("ray: expected --against with the original, and --work with a directory on a shared folder")
    kind = fidelity.kind_of(against or model)
    if max_kld is not None and kind == fidelity.ENCODER:
        raise ValueError("max-kld: expected a model that predicts tokens, got an encoder, which is measured by cosines")
    if tasks and kind != fidelity.DECODER:
        raise ValueError(f"task: expected a decoder, got an {kind}")
    if against is not None and model is not None:
        found = _evaluated(model, against, settings, restored, ray, ray_cpus)
    else:
        names = (
            [*codec, *([*fidelity.PEERS, fidelity.WHOLE_BF16] if peers else [])]
            if codec
            else fidelity.default_names(peers)
        )
        found = fidelity.evaluate_all(model, names, settings)
    if tasks:
        found.about["tasks"] = fidelity.harness_results((against and model) or found.about["reference"], tasks)
    if report is not None:
        from ..hf import load_tokenizer

        fidelity.write_report(found, report, load_tokenizer(found.about["reference"]))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print_evaluation(found)
    if restored and found.measured[-1].distances.any():
        typer.echo("the restored model's outputs differ from the original's", err=True)
        raise typer.Exit(1)
    worst = max(float(m.distances.mean()) for m in found.measured)
    if max_kld is not None and not worst <= max_kld:
        typer.echo(f"mean KL divergence {worst:.3e} is above {max_kld:g}", err=True)
        raise typer.Exit(1)


def _evaluated(model: str, against: str, settings: Any, restored: bool, ray: str | None, cpus: float) -> Any:
    from ..fidelity import evaluate_one

    if ray is None:
        return evaluate_one(model, against, settings, restored)
    from ..cluster import RayWindows, connected

    with connected(ray or None):
        return evaluate_one(model, against, settings, restored, RayWindows(cpus))


def _print_evaluation(found: Any) -> None:
    from rich.table import Table

    from ..fidelity import ENCODER, report_rows, report_tables

    about = found.about
    what = "token states" if about["kind"] == ENCODER else "predictions"
    title = f"{about['predictions']:,} {what} against {about['reference']}; {about['cpu']}, {about['isa']}"
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(title, highlight=False)
    for title, columns in report_tables(found).items():
        table = Table(title=title, title_justify="left")
        for key, name in columns.items():
            table.add_column(name, justify="left" if key == "name" else "right", no_wrap=key == "name")
        for row in report_rows(found):
            table.add_row(*(row.get(key, "") for key in columns))
        console.print(table)
