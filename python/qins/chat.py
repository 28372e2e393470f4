"""`qins generate` and `qins chat`: a model that talks in a terminal."""

from __future__ import annotations

from typing import Any

import torch

from .models import load_tokenizer, require_causal_lm, require_transformers


class Speaker:
    """A causal language model that prints tokens as they come.

    Args:
        model: directory or hub name, quantised by qins or not.
        tokens: how many it says at most.
        temperature: 0 takes the most likely token.

    """

    def __init__(self, model: str, tokens: int, temperature: float) -> None:
        transformers = require_transformers()
        require_causal_lm(model)
        self.name = model
        self.tokenizer = load_tokenizer(model)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
        self.streamer = transformers.TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        self.options: dict[str, Any] = {"max_new_tokens": tokens, **sampling}

    @torch.inference_mode()
    def say(self, prompt: str, *, special_tokens: bool = True) -> str:
        """Print what follows the prompt, and return it."""
        inputs = self.tokenizer(
            prompt, return_tensors="pt", add_special_tokens=special_tokens, return_token_type_ids=False
        )
        out = self.model.generate(**inputs, **self.options, streamer=self.streamer)
        text: str = self.tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return text


class Conversation:
    """Questions and answers in the format that a model was trained on.

    Raises:
        ValueError: the tokenizer has no chat template.

    """

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        if not getattr(speaker.tokenizer, "chat_template", None):
            raise ValueError(f"{speaker.name}: has no chat template; qins generate continues a text")
        self.speaker = speaker
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, question: str) -> str:
        """Print and return the answer to a question, with all that was said before in view."""
        self.messages.append({"role": "user", "content": question})
        prompt = self.speaker.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        text = self.speaker.say(prompt, special_tokens=False)  # the template has written them
        self.messages.append({"role": "assistant", "content": text})
        return text
