"""A float model's answers on disk, so that other models can be compared with it after it has left memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..codec import snr_db
from ..nn import QINSLinear, choose
from ..system import atomically, write_json
from .subjects import ENCODER, Answer, Item, Subject

Tensor = torch.Tensor

# Tokens for which the inputs and outputs of every layer are stored.
_LAYER_TOKENS = 64

# Version of the recording's files; recordings of another version are not resumed.
_LAYOUT = 2

# Prefixes of the files of a window.
_PREDICTIONS, _STATES = "window", "states"


def vocabulary(model: Any) -> int:
    """Return the number of tokens in a model's input embedding."""
    n: int = model.get_input_embeddings().num_embeddings
    return n


def check_vocabulary(name: str, model: Any, least: int) -> None:
    """Raise a ValueError if a model's vocabulary is smaller than `least`, which the tokenizer's ids need."""
    if vocabulary(model) < least:
        raise ValueError(
            f"{name}: expected a vocabulary of at least {least} tokens, as its tokenizer has, got {vocabulary(model)}"
        )


def left_out(model: Any) -> list[str]:
    """Return the names of the output embedding, which stays in float, as it does while a model loads."""
    head = model.get_output_embeddings()
    return ["lm_head", *(n for n, m in model.named_modules() if m is head)]


def fingerprint(model: str, items: list[Item], prompts: list[Tensor], new_tokens: int) -> str:
    """Return a hash of everything that a reusable recording depends on."""
    h = hashlib.sha256(f"{_LAYOUT} {model} {new_tokens}".encode())
    path = Path(model)
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file():
                h.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    for ids in [*(t for i in items for t in i.arguments.values()), *prompts]:
        h.update(ids.numpy().tobytes())
    return h.hexdigest()


class Recording:
    """A reference model's answers on windows of text, inputs and outputs of its layers, and greedy continuations.

    Log probabilities are float32 in one file per window: 4 * vocabulary bytes per token. Complete files are reused.

    Args:
        directory: the directory of the files.
        key: result of `fingerprint`.
        subject: the reference.
        items: its inputs.
        prompts: token ids to continue greedily.
        new_tokens: length of each continuation.

    Raises:
        FileExistsError: the directory holds a recording of something else.

    """

    def __init__(
        self, directory: Path, key: str, subject: Subject, items: list[Item], prompts: list[Tensor], new_tokens: int
    ) -> None:
        self.directory, self.subject, self.items = directory, subject, items
        self.prompts, self.new_tokens = prompts, new_tokens
        directory.mkdir(parents=True, exist_ok=True)
        about = directory / "about.json"
        if about.exists():
            if json.loads(about.read_text("utf-8")).get("fingerprint") != key:
                raise FileExistsError(f"{directory}: holds the answers of another model or to another text; remove it")
        else:
            write_json(about, {"fingerprint": key})

    def _file(self, what: str, i: int) -> Path:
        return self.directory / f"{what}-{i:05}.npy"

    @property
    def complete(self) -> bool:
        """Whether the recording is complete."""
        return (self.directory / "reference.json").exists()

    def record(self, model: nn.Module, advance: Callable[[int], None] = lambda _: None) -> None:
        """Record the reference's answers; resume where an earlier recording was interrupted."""
        self.check(model)
        for i, item in enumerate(self.items):
            self.record_window(model, i)
            advance(item.text.numel())
        layers = self.directory / "layers.safetensors"
        if not layers.exists():
            from safetensors.torch import save_file

            with torch.no_grad(), _watched(model) as seen:
                model(**{k: t[:, :_LAYER_TOKENS] for k, t in self.items[0].arguments.items()})
            with atomically(layers) as temporary:
                save_file(seen, str(temporary))
        answers, speed = [], 0.0
        for prompt in self.prompts:
            tokens, per_second = self.subject.continued(model, prompt, self.new_tokens)
            answers.append(tokens.tolist())
            speed = max(speed, per_second)
        about = {"answers": answers, "tokens_per_second": speed, "vocabulary": vocabulary(model)}
        write_json(self.directory / "reference.json", about)

    def check(self, model: nn.Module) -> None:
        """Raise a ValueError if the reference's vocabulary is smaller than its tokenizer's."""
        check_vocabulary(self.subject.name, model, 1 + max(int(i.text.max()) for i in self.items))

    def record_window(self, model: nn.Module, i: int) -> None:
        """Record the reference's answer on window i, unless that was done."""
        done = _STATES if self.subject.kind == ENCODER else _PREDICTIONS
        if self._file(done, i).exists():
            return
        answer = self.ask(model, self.items[i])
        # the file that marks a window as done is written last
        for what, values in ((_STATES, answer.states), (_PREDICTIONS, answer.log_probabilities)):
            if values is not None:
                with atomically(self._file(what, i)) as temporary, temporary.open("wb") as f:
                    np.save(f, values.numpy())

    def ask(self, model: nn.Module, item: Item) -> Answer:
        """Return the reference's answer to an item."""
        return self.subject.answer(model, item)

    def answer(self, i: int) -> Answer:
        """Return the reference's answer on window i, mapped from disk."""
        found = (self._file(what, i) for what in (_PREDICTIONS, _STATES))
        return Answer(*(torch.from_numpy(np.load(p, mmap_mode="c")) if p.exists() else None for p in found))

    def reference(self) -> dict[str, Any]:
        """Return a dictionary with answers (lists of tokens), tokens_per_second and vocabulary (number of tokens)."""
        about: dict[str, Any] = json.loads((self.directory / "reference.json").read_text("utf-8"))
        return about

    @torch.no_grad()
    def output_snr(self, model: nn.Module) -> dict[str, float]:
        """Return the SNR in dB of each layer's output, given the input of the reference's layer."""
        from safetensors import safe_open

        modules, snr = dict(model.named_modules()), {}
        with safe_open(str(self.directory / "layers.safetensors"), "pt") as f:
            for key in f.keys():  # noqa: SIM118 - not a dict
                name, _, what = key.rpartition(".")
                if what != "input" or name not in modules:
                    continue
                module = modules[name]
                x, expected = f.get_tensor(key), f.get_tensor(f"{name}.output").double()
                if (module.in_features, module.out_features) != (x.shape[-1], expected.shape[-1]):
                    continue  # the model's layers have another size
                # accessing the weight of a QINSLinear would dequantize it
                dtype = module.weight_dtype if isinstance(module, QINSLinear) else module.weight.dtype
                got = module(x.to(dtype)).double()
                noise = float((got - expected).square().sum())
                snr[name] = snr_db(float(expected.square().sum()), noise)
        return snr


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect inputs and outputs of the linear layers within the block."""
    seen: dict[str, Tensor] = {}
    hooks = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            seen[f"{name}.input"] = args[0].detach().reshape(-1, args[0].shape[-1]).float().clone()
            seen[f"{name}.output"] = y.detach().reshape(-1, y.shape[-1]).float().clone()

        return hook

    for module, name in choose(model, exclude=left_out(model)).items():
        hooks.append(module.register_forward_hook(look(name)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
