"""The command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from ..system import naming_extras, require

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ImportError:  # pragma: no cover - depends on the environment
    sys.exit("the qins command needs typer and rich: pip install 'qins[cli]'")

from .noise import noise, split_arguments

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _group_size(given: int | None) -> int | str | None:
    return "default" if given is None else given or None


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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say what is installed, and exit.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Results and errors only, also after the command.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="What is done, how long it took, and what libraries say of it."),
    ] = False,
) -> None:
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
    """Quantize a real language model and compare it with its float original."""
    require("torch", "transformers", "matplotlib")
    from .demo import run

    console = Console(stderr=as_json)
    result = run(model, codec, _group_size(group_size), tokens, picture, console)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="out_features x in_features of the layer.")] = "8192x3072",
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of activations; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="For each figure.")] = 0.4,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale: default 128; 0 for one scale a row.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time one layer on this machine: codes beside torch's float32 and bfloat16, and beside a plain read."""
    from .bench import run

    sizes = shape.lower().split("x")
    if len(sizes) != 2 or not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise ValueError(f"shape: expected OUTxIN, such as 8192x3072, got {shape!r}")
    result = run((int(sizes[0]), int(sizes[1])), rows or [1, 8, 64, 512], seconds, _group_size(group_size))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.table import Table

    about = result["machine"]
    scales = f"group_size {result['group_size']}" if result["group_size"] else "one scale a row"
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


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A safetensors, torch or GGUF file, or a directory with one model.")],
    against: Annotated[
        Path | None, typer.Option(help="Another checkpoint of the model: prints the error of every layer.")
    ] = None,
    histogram: Annotated[bool, typer.Option("--histogram", help="Draw how often each layer uses its codes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a saved model holds: codecs, dtypes, bytes by kind, compression. Exits with 1 if something is wrong."""
    from ..files import inspect as look

    report = look(path, against, histograms=histogram)
    typer.echo(report.to_json() if as_json else str(report))
    if report.problems:
        raise typer.Exit(1)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a float checkpoint, or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; an interrupted conversion is resumed.")],
    codec: Annotated[str, typer.Option(help="log8, log9, golden or rational.")] = "log8",
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale (log8): default 128; 0 for one scale a row.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of modules to quantize; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of modules to leave; may be repeated.")] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output embedding, too.")] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Quantize the input embedding, too.")] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="Text like what the model will read: log8's codes are chosen with it in view.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=256, help="Of it, at most.")] = 8192,
    target_bits: Annotated[
        float | None, typer.Option(help="Bits a weight to spend where they matter most, by choosing group sizes.")
    ] = None,
    target_kld: Annotated[
        float | None, typer.Option(help="Instead: as few bits as this estimated mean KL divergence allows.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Convert a checkpoint to codes on disk, a tensor at a time: any size, without making the model."""
    from ..files import read_text
    from ..hf import require_transformers

    require_transformers()
    from ..checkpoint import quantize_checkpoint
    from ..hf import Calibration, QinsConfig

    config = QinsConfig(
        codec, _group_size(group_size), include or None, exclude or (), lm_head=lm_head, embeddings=embeddings
    )
    calibration = None
    if calibrate is not None:
        calibration = Calibration(read_text(calibrate), calibration_tokens, target_bits, target_kld)
    elif target_bits is not None or target_kld is not None:
        raise ValueError("target-bits, target-kld: expected --calibrate TEXT beside them, got none")
    result = quantize_checkpoint(model, out, config, calibration=calibration)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    if "plan" in result:
        typer.echo(result["plan"])
    ratio = result["bytes_before"] / max(result["bytes_after"], 1)
    sizes = f"{result['bytes_before']:,} to {result['bytes_after']:,} bytes ({ratio:.2f}x)"
    sizes += f", from {result['source']}" if result["source"] else ""
    typer.echo(f"{result['layers']} layers, {sizes}, {len(result['files'])} files in {out}")


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub name; without --against, the float original of all others.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The float original that MODEL is measured against.")] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="What to make of the original and measure; may be repeated. See below.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Measure other formats of about 8 bits, too.")] = True,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; without it English that is shipped.")] = None,
    tokens: Annotated[int, typer.Option(min=32, help="Of it, at most.")] = 2048,
    window: Annotated[int, typer.Option(min=16, help="Tokens that the models see at a time.")] = 512,
    calibrate: Annotated[
        Path | None, typer.Option(help="Text for 'calibrated'; without it what of the text is not compared on.")
    ] = None,
    max_kld: Annotated[
        float | None, typer.Option(help="Exit with 1 if a measured model's mean KL divergence is above this.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file to write, with PNG pictures beside it.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Directory for the original's answers, to go on from and to use again.")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Task of lm-eval; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure how far a model's answers are from its float original's.

    Models of text: decoders, encoder-decoders (a piece of text is read, the next one predicted), masked language
    models (one token in seven is predicted) and encoders (cosines of hidden states).

    With --against, MODEL is measured as it is. Without, everything is made of MODEL and measured in one run: log8,
    calibrated, 'calibrated to N bits', 'log8 per row', log9, golden, rational, and as peers 'int8 per row', Q8_0,
    'uint8 per 64', 'fp8 e4m3 per row', 'bf16 weights' and 'bf16 model'.
    """
    require("torch", "transformers", *(["matplotlib", "jinja2"] if report is not None else []))
    from .. import fidelity
    from ..files import read_text

    settings = fidelity.Settings(
        text=None if text is None else read_text(text),
        tokens=tokens,
        window=window,
        calibration=None if calibrate is None else read_text(calibrate),
        directory=work,
    )
    if against is not None and (model is None or codec):
        raise ValueError("against: expected a MODEL to measure, and no --codec")
    kind = fidelity.kind_of(against or model)
    if max_kld is not None and kind == fidelity.ENCODER:
        raise ValueError("max-kld: expected a model that predicts tokens, got an encoder, which is measured by cosines")
    if tasks and kind != fidelity.DECODER:
        raise ValueError(f"task: expected a decoder, got an {kind}")
    if against is not None and model is not None:
        found = fidelity.evaluate_one(model, against, settings)
    else:
        names = (
            [*codec, *([*fidelity.PEERS, fidelity.WHOLE_BF16] if peers else [])]
            if codec
            else fidelity.default_names(model, peers)
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
    worst = max(float(m.distances.mean()) for m in found.measured)
    if max_kld is not None and not worst <= max_kld:
        typer.echo(f"mean KL divergence {worst:.3e} is above {max_kld:g}", err=True)
        raise typer.Exit(1)


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


Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample of the likeliest that add up to this.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample of this many of the likeliest.")]
MinP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Leave what is less likely, times the likeliest.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the random numbers, to get the same again.")]
Penalty = Annotated[float | None, typer.Option(min=0.01, help="Above 1 makes what was said before less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text to end at; may be repeated.")]
System = Annotated[str | None, typer.Option(help="What the model is told before the conversation.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say tokens a second, on stderr.")]


def _speaker(model: str, tokens: int, temperature: float, **options: Any) -> Any:
    for name in ("top_p", "top_k", "min_p"):
        if options[name] is not None and temperature == 0:
            raise ValueError(f"{name.replace('_', '-')}: expected a --temperature above 0 beside it")
    from .chat import Speaker

    return Speaker(model, tokens, temperature, **options)


def _said(last: dict[str, Any], as_json: bool, verbose: bool) -> None:
    if as_json:
        typer.echo(json.dumps(last))
    if verbose:
        speed = last["tokens_per_second"]
        prompt = f"prompt of {last['prompt_tokens']} tokens in {last['prompt_seconds']:.2f} s"
        typer.echo(f"{prompt}, {last['tokens']} tokens" + (f" at {speed:.1f} a second" if speed else ""), err=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """At Ctrl-C, which ends the command with code 130, put the shell's prompt on a line of its own."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo()
        raise


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("prompt: expected one of --prompt and --file, got both")
    if file is not None:
        from ..files import read_text

        return read_text(file)
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return sys.stdin.read()
    if prompt is None:
        raise ValueError("prompt: expected --prompt, --file or text on stdin, got none")
    return prompt


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Directory or hub name, quantized by qins or not.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to go on from; - or none of it reads stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="File to go on from.")] = None,
    as_chat: Annotated[bool, typer.Option("--chat", help="Take the prompt as a question (chat template).")] = False,
    system: System = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: text, counts, seconds.")] = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt, printing tokens as they come."""
    with _interruptible():
        text = _prompt(prompt, file)
        speaker = _speaker(
            model, tokens, temperature, silent=as_json, seed=seed, stop_strings=stop or None,
            top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        )  # fmt: skip
        if as_chat or system is not None:
            from .chat import Conversation

            Conversation(speaker, system).answer(text)
        else:
            if not as_json:
                typer.echo(text, nl=False)
            speaker.say(text)
        _said(speaker.last, as_json, verbose)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a model with a chat template.")],
    system: System = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a turn.")] = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model, a line at a time; an empty line or the end of the input ends it."""
    from .chat import Conversation

    with _interruptible():
        speaker = _speaker(
            model, tokens, temperature, silent=as_json, seed=seed, stop_strings=stop or None,
            top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        )  # fmt: skip
        conversation = Conversation(speaker, system)
        asking = sys.stdin.isatty()
        while True:
            if asking:
                typer.echo("> ", nl=False, err=as_json)
            line = sys.stdin.readline().strip()
            if not line:
                return
            conversation.answer(line)
            _said(speaker.last, as_json, verbose)


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit code 1, not a traceback."""
    quiet, verbose, arguments = split_arguments(sys.argv[1:])
    try:
        with naming_extras(), noise(quiet, verbose):
            app(arguments)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as e:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(str(e))}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
