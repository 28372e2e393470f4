"""`qins generate` and `qins chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample of the likeliest that add up to this.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample of this many of the likeliest.")]
MinP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Leave what is less likely, times the likeliest.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the random numbers, to get the same again.")]
Penalty = Annotated[float | None, typer.Option(min=0.01, help="Above 1 makes what was said before less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text to end at; may be repeated.")]
System = Annotated[str | None, typer.Option(help="What the model is told before the conversation.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print tokens per second, on stderr.")]


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
