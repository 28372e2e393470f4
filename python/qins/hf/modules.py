"""Modules of codes while transformers loads a model, those that still wait for their float weights among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from ..codec import encode
from ..nn import Coded, QINSEmbedding, QINSExperts, QINSLinear, field_layout, projections, stack_sizes
from .config import QinsConfig


class PendingLinear(QINSLinear):
    """A QINSLinear that still waits for its float weight, for the loader to find a key to match.

    The weight is a parameter on the meta device, of the shape that the checkpoint has.
    """

    transposed: bool  # the checkpoint's weight is (in_features, out_features), as Conv1D's

    @property
    def weight(self) -> torch.Tensor:
        """The parameter that stands for the weight to come."""
        return cast(torch.Tensor, self._parameters["weight"])

    @weight.setter
    def weight(self, value: Any) -> None:
        # transformers fills what the checkpoint lacks; the quantizer then says what that was
        self._parameters["weight"] = value

    def accept(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode the weight; from now on this is a QINSLinear."""
        fields = encode(weight.T if self.transposed else weight, self.codec, group_size=self.group_size).fields
        del self._parameters["weight"]
        self.__class__ = QINSLinear  # type: ignore[assignment] # in place: parents hold this very module
        return {n: torch.from_numpy(f) for n, f in fields.items()}


class PendingExperts(QINSExperts):
    """A QINSExperts that still waits for its float weights, parameters on the meta device as the original has them."""

    def __init__(self, original: nn.Module, codec: str, group_sizes: Mapping[str, int | None]) -> None:
        """Take the original's place; its stacks of matrices stay, on the meta device."""
        super().__init__(original, codec, group_sizes)
        for stack in self.shapes:
            weight = original.get_parameter(stack).detach()
            self._parameters[stack] = nn.Parameter(weight.to("meta"), requires_grad=False)

    def accept(self, stack: str, matrices: torch.Tensor | Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode the matrices of a projection; after the last one this is a QINSExperts."""
        buffers = self.encode(stack, matrices)
        del self._parameters[stack]
        if not self.waiting:
            self.__class__ = QINSExperts  # type: ignore[assignment] # in place, as above
        return buffers

    @property
    def waiting(self) -> list[str]:
        """The projections that have no codes yet."""
        return [stack for stack in self.shapes if stack in self._parameters]


def pending_layers(model: nn.Module) -> dict[str, PendingLinear]:
    """The layers of a model, by name, that wait for a weight to encode."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PendingLinear)}


def pending_experts(model: nn.Module) -> dict[str, PendingExperts]:
    """The modules of experts, by name, that wait for weights to encode."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PendingExperts)}


def conv1d() -> type[nn.Module]:
    """Transformers' linear layer with the weight transposed, as GPT-2 has it."""
    from transformers.pytorch_utils import Conv1D

    conv: type[nn.Module] = Conv1D
    return conv


def sizes(module: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a linear layer or a Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.get_parameter("weight")
    return weight.shape[0], weight.shape[1]


def coded_modules(model: nn.Module) -> Iterator[tuple[str, Coded]]:
    """The modules that hold codes, by name."""
    yield from ((n, m) for n, m in model.named_modules() if isinstance(m, Coded))


def empty_module(
    module: nn.Module, codec: str, group_size: int | None, linear: type[QINSLinear] = QINSLinear
) -> QINSLinear | QINSEmbedding:
    """A module without codes, on the meta device, for the place of a linear layer, a Conv1D or an embedding."""
    dtype = module.get_parameter("weight").dtype
    if isinstance(module, nn.Embedding):
        return QINSEmbedding.from_encoded(module, None, codec, group_size)
    in_features, out_features = sizes(module)
    new = linear(in_features, out_features, bias=False, codec=codec, group_size=group_size, device="meta", dtype=dtype)
    new._parameters["bias"] = module._parameters["bias"]  # the same, which may be another module's, too
    return new


def check_layer(name: str, layer: Coded) -> None:
    """Check shapes, dtypes, and what is small: reading all codes would touch every page of a mapped file."""
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
    """Replace a module."""
    new.train(old.training)
    new.__dict__["_is_hf_initialized"] = True  # there is no float weight to initialize
    model.set_submodule(name, new)


def submodule(model: Any, path: str) -> nn.Module | None:
    """Return a module by its path, or None."""
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError:
        return None
    return module


def experts_codec(config: QinsConfig, name: str, module: nn.Module) -> tuple[str, dict[str, int | None]]:
    """Codec and group sizes of a module of experts; overrides match its name."""
    about = {s: config.layer(name, stack_sizes(module, s)[2]) for s in projections(module)}
    return next(iter(about.values()))[0], {s: size for s, (_, size) in about.items()}
