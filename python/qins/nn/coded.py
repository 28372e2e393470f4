"""Base classes of the modules that hold codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..codec import FIELD_DTYPES, EncodedArray, decode_fields, encode, field_names, field_shapes, resolve_group_size


def field_layout(
    codec: str, shape: tuple[int, ...], group_size: int | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each field of a matrix (out, in), or of a stack of matrices (count, out, in)."""
    shapes = field_shapes(codec, shape, group_size)
    return {n: (shapes.get(n, shape[:-2]), _torch_dtype(n)) for n in field_names(codec, group_size)}


def _torch_dtype(field: str) -> torch.dtype:
    return getattr(torch, FIELD_DTYPES[field].name) if field in FIELD_DTYPES else torch.float32


@contextmanager
def floats_as_bits(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """View float32 buffers as integers within the block, so that a cast in `_apply` keeps their bits."""
    kept = [n for n in names if module._buffers[n].dtype == torch.float32]  # type: ignore[union-attr]
    for name in kept:
        module._buffers[name] = module._buffers[name].view(torch.int32)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for name in kept:
            module._buffers[name] = module._buffers[name].view(torch.float32)  # type: ignore[union-attr]


# Name, shape, group size and fields of a matrix, or of a stack of them.
Matrix = tuple[str, tuple[int, ...], int | None, list[torch.Tensor]]


class Coded(nn.Module):
    """A module with codes in buffers; its float32 buffers keep their bits through every cast.

    Attributes:
        codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".

    """

    codec: str
    _names: tuple[str, ...]
    _dtype: torch.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the dequantized weight."""
        return self._dtype

    def matrices(self, name: str) -> Iterator[Matrix]:
        """Yield the matrices of the module, whose name is given."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Coded:
        """Apply `fn` as nn.Module does, but keep the bits of float32 codes."""
        with floats_as_bits(self, self._names):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._names:  # copy_ would silently convert other dtypes
            value, own = state_dict.get(prefix + name), self._buffers[name]
            if isinstance(value, torch.Tensor) and own is not None and value.dtype != own.dtype:
                raise TypeError(f"{prefix}{name}: expected dtype {own.dtype}, got {value.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class CodedWeight(Coded):
    """A module that stores its `weight`, a matrix, as codes.

    The codes are buffers with the field names of docs/formats.md (for `golden`: stored, sign, log_min, log_max).

    Attributes:
        group_size: columns per group scale (log8, log6, log5, log4), or None.

    """

    group_size: int | None
    _shape: tuple[int, int]

    def _make_codes(
        self, shape: tuple[int, int], codec: str, group_size: int | str | None, device: Any, dtype: torch.dtype | None
    ) -> None:
        """Register the buffers; they hold the codes of zeros, unless they are on the meta device."""
        self.codec, self.group_size = codec, resolve_group_size(codec, group_size, shape[1])
        self._names, self._shape = field_names(codec, self.group_size), shape
        self._dtype = dtype or torch.get_default_dtype()
        layout = field_layout(codec, shape, self.group_size)
        if torch.device(device or torch.get_default_device()).type == "meta":
            for name, (s, kind) in layout.items():
                self.register_buffer(name, torch.empty(s, dtype=kind, device="meta"))
            return
        zero = encode(np.zeros((1, 8), np.float32), codec, group_size=self.group_size)
        for name, (s, kind) in layout.items():
            value = zero.fields[name].flat[0].item()
            self.register_buffer(name, torch.full(s, value, dtype=kind, device=device))

    def _take_codes(self, encoded: EncodedArray, device: Any) -> None:
        for name in self._names:
            self._buffers[name] = torch.from_numpy(encoded.fields[name]).to(device)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized matrix, a new tensor at each access; writing to it does not change the codes."""
        return decode_fields(self.codec, dict(self._buffers), self.group_size, self._dtype)  # type: ignore[arg-type]

    @weight.setter
    def weight(self, value: object) -> None:
        name = type(self).__name__
        raise AttributeError(f"weight of a {name} is decoded from its codes; from_{name[4:].lower()} makes new codes")

    def matrices(self, name: str) -> Iterator[Matrix]:
        """Yield the one matrix."""
        yield name, self._shape, self.group_size, [self.get_buffer(n) for n in self._names]

    @property
    def encoded(self) -> EncodedArray:
        """The codes as an EncodedArray that shares their memory (CPU only); every field is checked."""
        fields = {n: self._buffers[n].detach().numpy() for n in self._names}  # type: ignore[union-attr]
        return EncodedArray.from_fields(self.codec, fields, self.group_size)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as nn.Module does; refuse `weight`, which is decoded from the codes."""
        if name == "weight":
            type(self).weight.fset(self, param)  # type: ignore[attr-defined]
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Raise a RuntimeError: there is no float weight to initialize."""
        raise RuntimeError(f"a {type(self).__name__} cannot be re-initialized; initialize a float one and encode it")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        empty = state_dict.get(prefix + "weight")
        if isinstance(empty, torch.Tensor) and empty.numel() == 0:  # files have it beside the codes, see hf.names.guard
            del state_dict[prefix + "weight"]
        if prefix + "weight" in state_dict and prefix + self._names[0] not in state_dict:
            name = type(self).__name__
            raise RuntimeError(
                f"{prefix}weight: expected codes ({', '.join(self._names)}), got a float weight; load it into an "
                f"nn.{name[4:]} and use {name}.from_{name[4:].lower()}"
            )
        groups, own = state_dict.get(prefix + "group_scale"), self._buffers.get("group_scale")
        if isinstance(groups, torch.Tensor) and own is not None and groups.shape[1:] != own.shape[1:]:
            raise RuntimeError(
                f"{prefix}group_scale: expected {own.shape[1]} groups in a row, of group_size {self.group_size}, got "
                f"shape {tuple(groups.shape)}; pass the group_size of the saved codes (earlier versions' default was "
                "128, or 192 or 256 where these divide a row and 128 does not)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _codec_repr(self) -> str:
        return f"codec={self.codec}" + (f", group_size={self.group_size}" if self.group_size else "")
