"""The figures of an answer that `qins generate` and `qins chat` print."""

from __future__ import annotations

from typing import Any


def answer(
    model: str, prompt: str, text: str, prompt_tokens: int, tokens: int, *, begun: float, first: float, ended: float
) -> dict[str, Any]:
    """Return an answer with its counts and speeds, as --json prints them.

    Args:
        model: its directory or name.
        prompt: its prompt.
        text: its text.
        prompt_tokens: number of tokens of the prompt.
        tokens: number of tokens of the answer.
        begun: time in seconds at the beginning.
        first: time of the first token.
        ended: time at the end.

    """
    return {
        "model": model,
        "prompt": prompt,
        "text": text,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "prompt_seconds": first - begun,
        "seconds": ended - first,
        # the first token belongs to the prefill
        "tokens_per_second": (tokens - 1) / (ended - first) if tokens > 1 else None,
    }
