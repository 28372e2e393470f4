"""Text generation in a terminal, for `qins generate` and `qins chat`."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..hf import load_tokenizer, loading, require_causal_lm, require_transformers
from .timing import answer


class _Timed:
    """A streamer that records the time of the first token and passes tokens on to `shown`, if it is not None."""

    def __init__(self, shown: Any) -> None:
        self.shown = shown
        self.puts = 0
        self.first = 0.0

    def put(self, value: Any) -> None:
        self.puts += 1
        if self.puts == 2:  # the first put is the prompt
            self.first = time.perf_counter()
        if self.shown is not None:
            self.shown.put(value)

    def end(self) -> None:
        if self.shown is not None:
            self.shown.end()


class Speaker:
    """A causal language model that prints tokens as it generates them.

    Args:
        model: directory or hub name, quantized by qins or not.
        tokens: maximum number of new tokens.
        temperature: 0 decodes greedily.
        silent: print nothing.
        seed: seed of the sampling; None samples differently each time.
        sampling: further arguments of transformers' `generate`, such as top_p; None values are omitted.

    Attributes:
        last: of the latest `say`: see `cli.timing.answer`.

    """

    def __init__(
        self,
        model: str,
        tokens: int,
        temperature: float,
        *,
        silent: bool = False,
        seed: int | None = None,
        **sampling: Any,
    ) -> None:
        transformers = require_transformers()
        require_causal_lm(model)
        self.name = model
        self.silent = silent
        self.last: dict[str, Any] = {}
        self.tokenizer = load_tokenizer(model)
        with loading("the checkpoint of a causal language model", model):
            self.model = transformers.AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False).eval()
        self._streamer = transformers.TextStreamer
        chosen = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        given = {k: v for k, v in sampling.items() if v is not None}
        if "stop_strings" in given:
            given["tokenizer"] = self.tokenizer
            try:
                transformers.StopStringCriteria(self.tokenizer, given["stop_strings"])
            except Exception as e:  # it supports only some kinds of tokenizers, and may raise anything for others
                raise ValueError(
                    f"stop: expected a tokenizer that transformers can match stop strings with, such as a byte-level "
                    f"one, got {model}'s {type(self.tokenizer).__name__}: {e}"
                ) from e
        self.options: dict[str, Any] = {"max_new_tokens": tokens, **chosen, **given}
        if seed is not None:
            torch.manual_seed(seed)

    @torch.inference_mode()
    def say(self, prompt: str, *, special_tokens: bool = True) -> str:
        """Generate a continuation of the prompt, print it, and return it."""
        inputs = self.tokenizer(
            prompt, return_tensors="pt", add_special_tokens=special_tokens, return_token_type_ids=False
        )
        length = inputs.input_ids.shape[1]
        if not length:
            raise ValueError("prompt: expected at least one token, got none")
        shown = None if self.silent else self._streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer = _Timed(shown)
        begun = time.perf_counter()
        out = self.model.generate(**inputs, **self.options, streamer=streamer)
        ended = time.perf_counter()
        text: str = self.tokenizer.decode(out[0, length:], skip_special_tokens=True)
        self.last = answer(
            self.name, prompt, text, length, out.shape[1] - length, begun=begun, first=streamer.first, ended=ended
        )
        return text


class Conversation:
    """A conversation in the chat format that a model was trained on.

    Raises:
        ValueError: the tokenizer has no chat template.

    """

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        if not getattr(speaker.tokenizer, "chat_template", None):
            raise ValueError(f"{speaker.name}: has no chat template; use qins generate to continue a text")
        self.speaker = speaker
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, question: str) -> str:
        """Print and return the answer to a question, given the conversation so far."""
        self.messages.append({"role": "user", "content": question})
        prompt = self.speaker.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        text = self.speaker.say(prompt, special_tokens=False)  # the template has added them
        self.messages.append({"role": "assistant", "content": text})
        return text
