"""`qins generate` and `qins chat`."""

from __future__ import annotations

import enum
import functools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")]
TopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens, up to this total probability.")
]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from this many of the likeliest tokens.")]
MinP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Drop tokens less likely than this times the likeliest one.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the sampling, to reproduce a result.")]
Penalty = Annotated[float | None, typer.Option(min=0.01, help="Above 1 makes earlier tokens less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text to stop at; may be repeated.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print tokens per second, on stderr.")]


def _check_sampling(temperature: float, options: dict[str, Any]) -> None:
    for name in ("top_p", "top_k", "min_p"):
        if options[name] is not None and temperature == 0:
            raise ValueError(f"{name.replace('_', '-')}: expected --temperature above 0 with it")


def _speaker(model: str, tokens: int, temperature: float, **options: Any) -> Any:
    _check_sampling(temperature, options)
    from .chat import Speaker

    return Speaker(model, tokens, temperature, **options)


class Engine(str, enum.Enum):
    """What runs the model."""

    torch = "torch"
    core = "core"


def _core_speaker(model: str, tokens: int, temperature: float, *, as_chat: bool, **options: Any) -> Any:
    from .core_speaker import CoreSpeaker

    _check_sampling(temperature, options)
    refused = {"chat": as_chat, "repetition-penalty": options.pop("repetition_penalty") is not None}
    for name, given in refused.items():
        if given:
            raise ValueError(f"{name}: --engine core does not have it; omit --engine")
    options["stop"] = options.pop("stop_strings") or ()
    return CoreSpeaker(model, tokens, temperature, **options)


def _said(last: dict[str, Any], as_json: bool, verbose: bool) -> None:
    if as_json:
        typer.echo(json.dumps(last))
    if verbose:
        speed = last["tokens_per_second"]
        prompt = f"prompt of {last['prompt_tokens']} tokens in {last['prompt_seconds']:.2f} s"
        typer.echo(f"{prompt}, {last['tokens']} tokens" + (f" at {speed:.1f} per second" if speed else ""), err=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """On Ctrl-C, which ends the command with code 130, print a newline, so that the shell prompt starts a line."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo()
        raise


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("prompt: expected one of --prompt and --file, got both")
    if file is not None:
        from ..system import read_text

        return read_text(file)
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return sys.stdin.read()
    if prompt is None:
        raise ValueError("prompt: expected --prompt, --file or text on stdin, got none")
    return prompt


def generate(
    model: Annotated[str, typer.Argument(help="Directory or hub name, quantized by qins or not.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; - reads stdin, as does omitting it.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    as_chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template to the prompt.")] = False,
    system: System = None,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    engine: Annotated[
        Engine, typer.Option(help="core: without torch, for directories that qins quantize wrote.")
    ] = Engine.torch,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: text, counts, seconds.")] = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt, printing tokens as they are generated."""
    with _interruptible():
        text = _prompt(prompt, file)
        chats = as_chat or system is not None
        make = functools.partial(_core_speaker, as_chat=chats) if engine is Engine.core else _speaker
        speaker = make(
            model, tokens, temperature, silent=as_json, seed=seed, stop_strings=stop or None,
            top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        )  # fmt: skip
        if chats:
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
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per turn.")] = False,
    verbose: Verbose = False,
) -> None:
    """Chat with a model, one line at a time; an empty line or the end of input exits."""
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
