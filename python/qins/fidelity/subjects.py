"""The kinds of text models that can be evaluated: by predictions, or by the states of an encoder."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..hf import load_floats, load_tokenizer, loading, require_transformers
from .metrics import greedy, windows

Tensor = torch.Tensor

DECODER, ENCODER_DECODER, MASKED, ENCODER = "decoder", "encoder-decoder", "masked language model", "encoder"

# A masked language model predicts one token in seven, about the share that it was trained with.
_MASK_EVERY, _MASK_FIRST = 7, 3


@dataclass(frozen=True)
class Item:
    """One input of a model.

    Attributes:
        arguments: arguments of its forward.
        text: (length,) token ids in reading order.
        at: positions in the text that are predicted, or whose states are compared.
        rows: rows of these positions in the logits or states.

    """

    arguments: dict[str, Tensor]
    text: Tensor
    at: Tensor
    rows: Tensor

    @property
    def targets(self) -> Tensor:
        """The text's own tokens at these positions."""
        return self.text[self.at]


@dataclass(frozen=True)
class Answer:
    """A model's answer to an item: log probabilities, last hidden states, or both; float32, one row per position."""

    log_probabilities: Tensor | None = None
    states: Tensor | None = None


@dataclass(frozen=True)
class Subject:
    """A transformers model that can be evaluated on text.

    Attributes:
        name: directory or hub name.
        kind: DECODER, ENCODER_DECODER, MASKED or ENCODER.
        architecture: its class in transformers.
        config: its config.

    """

    name: str
    kind: str
    architecture: type[Any]
    config: Any

    @property
    def limit(self) -> int:
        """The longest input, in tokens."""
        most = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not isinstance(most, int) or most < 1:
            return 1 << 30
        if self.kind in (MASKED, ENCODER):  # in some, positions begin after the padding token's id
            most -= (getattr(self.config, "pad_token_id", None) or 0) + 1
        return most

    def tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises:
            ValueError: there is no usable tokenizer.

        """
        try:
            made = load_tokenizer(self.name)
        except Exception as e:  # the exception depends on the tokenizer
            raise ValueError(f"{self.name}: expected a tokenizer beside the model: {_first_line(e)}") from e
        return made

    def load(self, path: str, **kwargs: Any) -> Any:
        """Load a checkpoint as this architecture.

        Raises:
            ValueError: weights are missing, or the checkpoint cannot be read.

        """
        with loading(f"a checkpoint of {self.architecture.__name__}", path):
            model, info = load_floats(self.architecture, path, output_loading_info=True, **kwargs)
        missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)  # the pooler makes no hidden state
        if missing:
            raise ValueError(
                f"{path}: expected all weights of {self.architecture.__name__}, {len(missing)} are missing, "
                f"such as {missing[0]}"
            )
        return model.eval()

    def items(self, tokenizer: Any, text: str, tokens: int, window: int) -> tuple[list[Item], Tensor]:
        """Cut a text into items; also return the ids after the last one.

        Raises:
            ValueError: the text is too short.

        """
        whole = _ids(tokenizer, text, True)
        words = len(text.split())
        unknown = 0 if tokenizer.unk_token_id is None else int((whole == tokenizer.unk_token_id).sum())
        if unknown > len(whole) / 3 or len(whole) < words / 2:  # without their files, some tokenizers load empty
            raise ValueError(
                f"{self.name}: expected a tokenizer beside the model that knows the text's words, got {len(whole)} "
                f"tokens from {words} words, {unknown} of them unknown"
            )
        if self.kind == DECODER:
            window = min(window, self.limit)
            ids, rest = whole[:tokens], whole[tokens:]
        else:
            bare = _ids(tokenizer, text, False)
            prefix, suffix = _around(whole, bare)
            window = min(window, self.limit - len(prefix) - len(suffix), tokenizer.model_max_length)
            ids, rest = bare[:tokens], bare[tokens:]
        if self.kind == ENCODER_DECODER:
            window = min(window, len(ids) // 2)
        if len(ids) < 32:
            raise ValueError(f"text: expected at least 32 tokens, got {len(ids)}")
        if window < 2:
            raise ValueError(f"window: expected room for at least 2 tokens, got {window} in {self.name}")
        parts = [w[0] for w in windows(ids, tokens, window)]
        if self.kind == DECODER:
            return [_next_tokens(w) for w in parts], rest
        whole_parts = [torch.cat([prefix, w, suffix]) for w in parts]
        if self.kind == ENCODER_DECODER:
            start = self._start()
            return [_pair(a, b, start) for a, b in pairwise(whole_parts)], rest
        if self.kind == ENCODER:
            every = [torch.arange(len(w)) for w in whole_parts]
            return [Item({"input_ids": w[None]}, w, at, at) for w, at in zip(whole_parts, every, strict=True)], rest
        mask = tokenizer.mask_token_id
        if mask is None:
            raise ValueError(f"{self.name}: expected a tokenizer with a mask token, got one without")
        return [_masked(w, len(prefix), len(suffix), mask) for w in whole_parts if len(w) > _MASK_FIRST], rest

    def _start(self) -> int:
        """Return the token with which a decoder begins."""
        for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            if isinstance(found := getattr(self.config, key, None), int):
                return found
        raise ValueError(f"{self.name}: expected a decoder_start_token_id in its config, got none")

    def calibration(self, batch: Tensor) -> Any:
        """Return the arguments of forward for a batch of token ids."""
        if self.kind != ENCODER_DECODER or batch.shape[1] < 2:
            return batch
        half = batch.shape[1] // 2
        begin = torch.full((len(batch), 1), self._start())
        return {"input_ids": batch[:, :half], "decoder_input_ids": torch.cat([begin, batch[:, half:-1]], 1)}

    def prompts(self, items: list[Item], count: int, tokens: int, new_tokens: int) -> list[Tensor]:
        """Return prompts of token ids, (1, length); none for models that do not generate."""
        if self.kind not in (DECODER, ENCODER_DECODER):
            return []
        tokens = max(1, min(tokens, self.limit - new_tokens))
        chosen = [items[i * len(items) // count] for i in range(min(count, len(items)))]
        return [i.arguments["input_ids"][:, :tokens] for i in chosen]

    def continued(self, model: Any, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float]:
        """Return greedy tokens after a prompt, and tokens per second."""
        if self.kind == DECODER:
            return greedy(model, prompt, new_tokens)
        with torch.no_grad():
            encoded = model.get_encoder()(prompt)
        return greedy(model, torch.tensor([[self._start()]]), new_tokens, "decoder_input_ids", encoder_outputs=encoded)

    def most_likely(self, model: Any, prompt: Tensor, answer: Tensor) -> Tensor:
        """Return the model's most likely token at each position of an answer, given the answer's tokens before it."""
        if self.kind == DECODER:
            item = _next_tokens(torch.cat([prompt[0], answer]))
        else:
            item = _pair(prompt[0], answer, self._start())
        log_p = self.answer(model, item).log_probabilities
        assert log_p is not None
        return log_p[-len(answer) :].argmax(-1)

    @torch.no_grad()
    def answer(self, model: Any, item: Item) -> Answer:
        """Return a model's answer to an item."""
        arguments: dict[str, Any] = dict(item.arguments)
        if self.kind in (DECODER, ENCODER_DECODER):
            arguments["use_cache"] = False
        else:
            arguments["output_hidden_states"] = True
        out = model(**arguments)
        log_p = states = None
        if self.kind != ENCODER:
            log_p = out.logits[0, item.rows].float().log_softmax(-1)
        if self.kind in (MASKED, ENCODER):
            last = getattr(out, "last_hidden_state", None)
            states = (out.hidden_states[-1] if last is None else last)[0].float()
        return Answer(log_p, states)


def _ids(tokenizer: Any, text: str, special: bool) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False).input_ids, dtype=torch.int64)


def _around(whole: Tensor, bare: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a tokenizer adds before and after a text."""
    for n in range(len(whole) - len(bare) + 1):
        if torch.equal(whole[n : n + len(bare)], bare):
            return whole[:n], whole[n + len(bare) :]
    return bare[:0], bare[:0]


def _next_tokens(ids: Tensor) -> Item:
    rows = torch.arange(len(ids) - 1)
    return Item({"input_ids": ids[None]}, ids, rows + 1, rows)


def _pair(source: Tensor, target: Tensor, start: int) -> Item:
    """Make an item with one piece of text to read and the next to predict."""
    before = torch.cat([torch.tensor([start]), target[:-1]])
    rows = torch.arange(len(target))
    arguments = {"input_ids": source[None], "decoder_input_ids": before[None]}
    return Item(arguments, torch.cat([source, target]), rows + len(source), rows)


def _masked(ids: Tensor, before: int, after: int, mask: int) -> Item:
    at = torch.arange(before + min(_MASK_FIRST, len(ids) - before - after - 1), len(ids) - after, _MASK_EVERY)
    hidden = ids.clone()
    hidden[at] = mask
    return Item({"input_ids": hidden[None]}, ids, at, at)


def _first_line(e: Exception) -> str:
    line = next(iter(str(e).strip().splitlines()), type(e).__name__)
    return textwrap.shorten(line, 300, placeholder=" ...")


def subject(name: str) -> Subject:
    """Determine the kind of a model.

    Args:
        name: directory or hub name.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it is not a transformers model, or not a text model.

    """
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name}: expected a directory or hub name of a model, got a file")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise FileNotFoundError(f"{name}: no such directory")
    transformers = require_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as e:  # the exception depends on the files
        raise ValueError(f"{name}: expected a directory or hub name of a model: {_first_line(e)}") from e
    told = (config.architectures or [""])[0]
    architecture = getattr(transformers, told, None)
    if architecture is None:
        if config.model_type in _names(transformers, "CAUSAL_LM") and not config.is_encoder_decoder:
            return Subject(name, DECODER, transformers.AutoModelForCausalLM, config)
    elif kind := _kind(transformers, told, architecture, config):
        return Subject(name, kind, architecture, config)
    raise ValueError(
        f"{name}: expected a text model: a decoder, an encoder-decoder with its language model head, a masked "
        f"language model or an encoder; got {told or config.model_type}"
    )


def _names(transformers: Any, task: str) -> dict[str, Any]:
    auto = transformers.models.auto.modeling_auto
    found: dict[str, Any] = getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
    return found


def _kind(transformers: Any, told: str, architecture: type[Any], config: Any) -> str | None:
    def has(task: str) -> bool:
        names = _names(transformers, task).values()
        return any(told == n if isinstance(n, str) else told in n for n in names)

    both = bool(getattr(config, "is_encoder_decoder", False))
    if has("SEQ_TO_SEQ_CAUSAL_LM"):
        return ENCODER_DECODER if both else DECODER
    if not both and has("MASKED_LM"):
        return MASKED
    if has("CAUSAL_LM") or (not both and has("IMAGE_TEXT_TO_TEXT")):
        return DECODER
    modes = getattr(architecture, "input_modalities", "text")
    text = architecture.main_input_name == "input_ids" and modes in ("text", ("text",), ["text"])
    other = any(hasattr(config, f"{k}_config") for k in ("vision", "audio"))
    if text and not other and (not both or told.endswith("EncoderModel")):
        return ENCODER
    return None
