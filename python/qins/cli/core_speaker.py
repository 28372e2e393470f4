"""`qins generate --engine core`: text generation with NumPy, the core and the tokenizers package, without torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..decoder import Decoder
from ..system import read_json, require
from .timing import answer

_UNFINISHED = "\ufffd"  # the last bytes decode to this if their character has more bytes


class CoreSpeaker:
    """A converted model that prints tokens as it generates them; takes the place of `cli.chat.Speaker`.

    Args:
        model: directory of a converted model, with its tokenizer.json.
        tokens: maximum number of new tokens.
        temperature: 0 decodes greedily.
        silent: print nothing.
        stop: texts to stop at.
        sampling: further arguments of `Decoder.generate`.

    Attributes:
        last: of the latest `say`: see `cli.timing.answer`.

    Raises:
        FileNotFoundError: there is no such directory, or no tokenizer.json in it.
        ValueError: see `Decoder.open`.

    """

    def __init__(
        self,
        model: str,
        tokens: int,
        temperature: float,
        *,
        silent: bool = False,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> None:
        require("tokenizers")
        from tokenizers import Tokenizer

        self.name, self.silent, self.stop = model, silent, list(stop)
        self.last: dict[str, Any] = {}
        self.decoder = Decoder.open(model)
        file = Path(model) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{model}: expected a tokenizer.json beside the weights, found none")
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as e:  # the package raises only this class
            raise ValueError(f"{file}: expected a tokenizer: {e}") from None
        self._ends = _end_tokens(Path(model))
        self._options = {"max_new_tokens": tokens, "temperature": temperature, "stop": self._ends, **sampling}

    def say(self, prompt: str) -> str:
        """Generate a continuation of the prompt, print it, and return it."""
        ids = self.tokenizer.encode(prompt).ids
        if not ids:
            raise ValueError("prompt: expected at least one token, got none")
        self.decoder.reset()
        made: list[int] = []
        text, shown, first = "", 0, 0.0
        begun = time.perf_counter()
        for token in self.decoder.generate(ids, **self._options):
            first = first or time.perf_counter()
            made.append(token)
            text = self.tokenizer.decode(made)
            ends = [at + len(s) for s in self.stop if (at := text.find(s)) >= 0]
            text = text[: min(ends)] if ends else text
            if not self.silent and not text.endswith(_UNFINISHED):
                typer.echo(text[shown:], nl=False)
                shown = len(text)
            if ends:
                break
        ended = time.perf_counter()
        if not self.silent:
            typer.echo(text[shown:])
        self.last = answer(self.name, prompt, text, len(ids), len(made), begun=begun, first=first, ended=ended)
        return text


def _end_tokens(model: Path) -> list[int]:
    """Return the ids of tokens that end a text: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(model / name).get("eos_token_id") if (model / name).is_file() else None
        if found is not None:
            listed = found if isinstance(found, list) else [found]
            if not all(isinstance(i, int) for i in listed):
                raise ValueError(f"{model / name}: eos_token_id: expected an integer or a list of them, got {found!r}")
            return listed
    return []
