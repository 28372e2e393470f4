"""Quantized modules while transformers loads a model, including those that still wait for their float weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..codec import encode
from ..nn import Coded, QINSEmbedding, QINSExperts, QINSLinear, field_layout, format_of_experts
from ..system import give_back_freed_memory
from .config import QinsConfig
from .parts import Part, narrow, parts_of

# Codes of at least this many bytes are returned to the system at once: that costs little next to encoding them.
_WORTH_GIVING_BACK = 1 << 20


class PendingLinear(QINSLinear):
    """A QINSLinear that still waits for its float weight.

    The weight is a parameter on the meta device, in the checkpoint's shape, so that the loader matches its key.
    """

    transposed: bool  # the checkpoint's weight is (in_features, out_features), as in Conv1D

    @property
    def weight(self) -> torch.Tensor:
        """The meta parameter in place of the weight to load."""
        return cast(torch.Tensor, self._parameters["weight"])

    @weight.setter
    def weight(self, value: Any) -> None:
        # transformers fills in missing weights; the quantizer then reports them
        self._parameters["weight"] = value

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Show the whole weight where transformers has sharded it, so that the whole is loaded."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _show_whole(destination, prefix, ("weight",))

    def accept(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode the weight, return the codes as buffers, this rank's part of them, and become a QINSLinear."""
        encoded = encode(weight.T if self.transposed else weight, self.codec, group_size=self.group_size)
        codes = {n: torch.from_numpy(np.asarray(f)) for n, f in encoded.fields.items()}
        del self._parameters["weight"], encoded
        self.__class__ = QINSLinear  # type: ignore[assignment] # in place, since parents hold this object
        part = narrow(self)
        return codes if part is None else _cut(part, codes)


class PendingExperts(QINSExperts):
    """A QINSExperts that still waits for its float weights: meta parameters with the original's names and shapes."""

    def __init__(self, original: nn.Module, codec: str, group_sizes: Mapping[str, int | None]) -> None:
        """Replace the original; its stacks of matrices remain as meta parameters."""
        super().__init__(original, codec, group_sizes)
        for stack in self.shapes:
            weight = original.get_parameter(stack).detach()
            self._parameters[stack] = nn.Parameter(weight.to("meta"), requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Show the whole weights, as PendingLinear does."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _show_whole(destination, prefix, tuple(self.shapes))

    def accept(self, stack: str, matrices: torch.Tensor | Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode a projection's matrices and return the buffers; become a QINSExperts after the last projection."""
        part = parts_of(self).get(stack)
        buffers = self.encode(stack, matrices) if part is None else self._encode_part(part, stack, matrices)
        del self._parameters[stack]
        if not self.waiting:
            self.__class__ = QINSExperts  # type: ignore[assignment] # in place, as above
        return buffers

    def _encode_part(
        self, part: Part, stack: str, matrices: torch.Tensor | Iterator[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Encode a projection's matrices, each as a whole; return this rank's part of them."""
        own = {n: torch.empty(s, dtype=d) for n, (s, d) in part.own_layout.items()}
        (first, end), *_ = part.spans[0]
        for i, encoded in self.encode_each(stack, matrices, range(first, end)):
            fields = {n: torch.from_numpy(np.asarray(encoded.fields[n])) for n in own}
            for n, t in part.of_each.cut(fields).items():
                own[n][i - first] = t
            del encoded, fields  # freed before the next ones are made
        narrow(self, stack)
        return {f"{stack}_{n}": t for n, t in own.items()}

    @property
    def waiting(self) -> list[str]:
        """Names of the projections that have no codes yet."""
        return [stack for stack in self.shapes if stack in self._parameters]


def _cut(part: Part, codes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a rank's part of codes, and give the memory of the whole back to the system."""
    own = part.cut(codes)
    size = sum(t.nbytes for t in codes.values())
    codes.clear()
    if size >= _WORTH_GIVING_BACK:
        give_back_freed_memory()  # it is between parts that stay in memory
    return own


def _show_whole(state: Any, prefix: str, names: tuple[str, ...]) -> None:
    for name in names:
        t = state.get(prefix + name)
        if hasattr(t, "placements"):
            state[prefix + name] = torch.empty(t.shape, dtype=t.dtype, device="meta")


def pending_layers(model: nn.Module) -> dict[str, PendingLinear]:
    """Return a model's layers, by name, that still wait for a weight to encode."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PendingLinear)}


def pending_experts(model: nn.Module) -> dict[str, PendingExperts]:
    """Return a model's modules of experts, by name, that still wait for weights to encode."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PendingExperts)}


def conv1d() -> type[nn.Module]:
    """Return Conv1D, transformers' linear layer with a transposed weight, as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    conv: type[nn.Module] = Conv1D
    return conv


def sizes(module: nn.Module) -> tuple[int, int]:
    """Return in_features and out_features of a linear layer or a Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.get_parameter("weight")
    return weight.shape[0], weight.shape[1]


def coded_modules(model: nn.Module) -> Iterator[tuple[str, Coded]]:
    """Yield name and module of the modules that hold codes."""
    yield from ((n, m) for n, m in model.named_modules() if isinstance(m, Coded))


def empty_module(
    module: nn.Module, codec: str, group_size: int | None, linear: type[QINSLinear] = QINSLinear
) -> QINSLinear | QINSEmbedding:
    """Return a module without codes, on the meta device, to replace a linear layer, a Conv1D or an embedding."""
    dtype = module.get_parameter("weight").dtype
    if isinstance(module, nn.Embedding):
        return QINSEmbedding.from_encoded(module, None, codec, group_size)
    in_features, out_features = sizes(module)
    new = linear(in_features, out_features, bias=False, codec=codec, group_size=group_size, device="meta", dtype=dtype)
    new._parameters["bias"] = module._parameters["bias"]  # the same object: another module may share it
    return new


def check_layer(name: str, layer: Coded) -> None:
    """Check shapes, dtypes, and that float32 fields are finite.

    It does not check the codes: that would read every page of a memory-mapped file.

    Raises:
        ValueError: a field does not fit, or has a NaN or an infinity.

    """
    for part, shape, group_size, buffers in layer.matrices(name):
        layout = field_layout(layer.codec, shape, group_size)
        for (n, (expected, dtype)), buffer in zip(layout.items(), buffers, strict=True):
            if buffer.shape != expected:
                raise ValueError(f"{part}.{n}: expected shape {expected}, got {tuple(buffer.shape)}")
            if buffer.dtype != dtype:
                raise ValueError(f"{part}.{n}: expected {dtype}, got {buffer.dtype}")
            if dtype == torch.float32 and not bool(torch.isfinite(buffer).all()):
                raise ValueError(f"{part}.{n}: expected finite numbers, got NaN or infinity; the file is damaged")


def put(model: Any, name: str, old: nn.Module, new: nn.Module) -> None:
    """Replace a module of the model; the new one takes over the training mode."""
    new.train(old.training)
    new.__dict__["_is_hf_initialized"] = True  # there is no float weight to initialize
    model.set_submodule(name, new)


def submodule(model: Any, path: str) -> nn.Module | None:
    """Return a module by its path, or None if there is none."""
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError:
        return None
    return module


def experts_codec(config: QinsConfig, name: str, module: nn.Module) -> tuple[str, dict[str, int | None]]:
    """Return the codec, and the group size per projection, of a module of experts; overrides match its name."""
    codec, sizes, _ = format_of_experts(module, *config.asked(name))
    return codec, sizes
