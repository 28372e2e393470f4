"""A float model's answers on the disk, so that others can be compared with it when it is no longer in memory."""

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

from ._atomic import atomically, write_json
from .conversion import choose, snr_db
from .evaluate import greedy, log_probabilities
from .linear import QINSLinear

Tensor = torch.Tensor

# Tokens whose passage through every layer is kept.
_LAYER_TOKENS = 64


def fingerprint(model: str, windows: list[Tensor], prompts: list[Tensor], new_tokens: int) -> str:
    """What must be the same for a recording to be used again."""
    h = hashlib.sha256(f"{model} {new_tokens}".encode())
    path = Path(model)
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file():
                h.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    for ids in [*windows, *prompts]:
        h.update(ids.numpy().tobytes())
    return h.hexdigest()


class Recording:
    """Log probabilities of a reference model on windows of text, its layers' inputs and outputs, its greedy answers.

    Log probabilities are float32, a file a window: 4 * vocabulary bytes a token. What is complete is not made again.

    Args:
        directory: where the files are, or will be.
        key: what `fingerprint` returned.
        windows: token ids, (1, length) each.
        prompts: token ids to continue greedily.
        new_tokens: how many tokens each continuation has.

    Raises:
        FileExistsError: the directory holds a recording of something else.

    """

    def __init__(
        self, directory: Path, key: str, windows: list[Tensor], prompts: list[Tensor], new_tokens: int
    ) -> None:
        self.directory, self.windows, self.prompts, self.new_tokens = directory, windows, prompts, new_tokens
        directory.mkdir(parents=True, exist_ok=True)
        about = directory / "about.json"
        if about.exists():
            if json.loads(about.read_text("utf-8")).get("fingerprint") != key:
                raise FileExistsError(f"{directory}: holds the answers of another model or to another text; remove it")
        else:
            write_json(about, {"fingerprint": key})

    def _window(self, i: int) -> Path:
        return self.directory / f"window-{i:05}.npy"

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        return (self.directory / "reference.json").exists()

    def record(self, model: nn.Module, advance: Callable[[int], None] = lambda _: None) -> None:
        """Let the reference model answer; goes on where it was interrupted."""
        for i, ids in enumerate(self.windows):
            if not self._window(i).exists():
                with atomically(self._window(i)) as temporary, temporary.open("wb") as f:
                    np.save(f, log_probabilities(model, ids).numpy())
            advance(ids.numel())
        layers = self.directory / "layers.safetensors"
        if not layers.exists():
            from safetensors.torch import save_file

            with torch.no_grad(), _watched(model) as seen:
                model(self.windows[0][:, :_LAYER_TOKENS], use_cache=False)
            with atomically(layers) as temporary:
                save_file(seen, str(temporary))
        answers, speed = [], 0.0
        for prompt in self.prompts:
            tokens, per_second = greedy(model, prompt, self.new_tokens)
            answers.append(tokens.tolist())
            speed = max(speed, per_second)
        write_json(self.directory / "reference.json", {"answers": answers, "tokens_per_second": speed})

    def log_probabilities(self, i: int) -> Tensor:
        """Return the reference's log probabilities on window i, mapped from the disk."""
        return torch.from_numpy(np.load(self._window(i), mmap_mode="c"))

    def reference(self) -> dict[str, Any]:
        """Return answers, lists of tokens, and tokens_per_second."""
        about: dict[str, Any] = json.loads((self.directory / "reference.json").read_text("utf-8"))
        return about

    @torch.no_grad()
    def output_snr(self, model: nn.Module) -> dict[str, float]:
        """SNR in dB of each layer's output, each given the input that the reference's layer was given."""
        from safetensors import safe_open

        modules, snr = dict(model.named_modules()), {}
        with safe_open(str(self.directory / "layers.safetensors"), "pt") as f:
            for key in f.keys():  # noqa: SIM118 - not a dict
                name, _, what = key.rpartition(".")
                if what != "input" or name not in modules:
                    continue
                module = modules[name]
                # of a QINSLinear, asking for the weight would decode it
                dtype = module.weight_dtype if isinstance(module, QINSLinear) else module.weight.dtype
                expected = f.get_tensor(f"{name}.output").double()
                got = module(f.get_tensor(key).to(dtype)).double()
                noise = float((got - expected).square().sum())
                snr[name] = snr_db(float(expected.square().sum()), noise)
        return snr


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect inputs and outputs of the linear layers meanwhile."""
    seen: dict[str, Tensor] = {}
    hooks = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            seen[f"{name}.input"] = args[0].detach().reshape(-1, args[0].shape[-1]).float().clone()
            seen[f"{name}.output"] = y.detach().reshape(-1, y.shape[-1]).float().clone()

        return hook

    for module, name in choose(model).items():
        hooks.append(module.register_forward_hook(look(name)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
