"""QINSLinear: nn.Linear whose weight is codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from .array import SCALARS, EncodedArray, check_codec, check_group_size, encode, field_shapes
from .ops import decode_fields, field_names, multiply

# One more byte for 128 codes: 1 dB better than one scale a row at no loss of speed, and still 3.96
# times smaller than float32 (docs/formats.md has the figures). The others are for rows that 128 would
# leave a short group of, which takes a byte, too.
_DEFAULT_GROUP_SIZES = (128, 192, 256)


def default_group_size(in_features: int) -> int:
    """Inputs that share a group scale in a log8 layer: 128, or 192 or 256 where these divide a row and 128 does not."""
    return next((size for size in _DEFAULT_GROUP_SIZES if in_features % size == 0), _DEFAULT_GROUP_SIZES[0])


FIELD_DTYPES = {
    "stored": torch.uint8,
    "sign": torch.int8,
    "sign_bits": torch.uint8,
    "codes": torch.uint8,
    "scale": torch.float32,
    "group_scale": torch.uint8,
    "w_encoded": torch.uint8,
}


def resolve_group_size(codec: str, group_size: int | str | None, in_features: int) -> int | None:
    """Check a group_size argument; "default" stands for `default_group_size` in a log8 layer."""
    check_codec(codec)
    if isinstance(group_size, str):
        if group_size != "default":
            raise ValueError(f"group_size: expected a positive integer, None or 'default', got {group_size!r}")
        return default_group_size(in_features) if codec == "log8" else None
    return check_group_size(codec, group_size)


@contextmanager
def floats_as_bits(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Show float32 buffers as integers meanwhile: a cast in `_apply` then leaves their bits alone."""
    kept = [n for n in names if module._buffers[n].dtype == torch.float32]  # type: ignore[union-attr]
    for name in kept:
        module._buffers[name] = module._buffers[name].view(torch.int32)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for name in kept:
            module._buffers[name] = module._buffers[name].view(torch.float32)  # type: ignore[union-attr]


class QINSLinear(nn.Linear):
    """A linear layer that keeps its weight as 8-bit logarithmic codes and computes y = x @ W.T + bias.

    The codes are buffers named as docs/formats.md names the fields (for `golden`: stored, sign, log_min,
    log_max); `bias` stays a parameter and trains, and gradients flow to the input. Scales and ranges
    stay float32 through every `.to(dtype)`.

    Args:
        in_features: K, size of the last dimension of the input.
        out_features: N, size of the last dimension of the output.
        bias: whether the layer has a bias.
        codec: "log8", "log9", "golden" or "rational".
        group_size: inputs that share a group scale (log8); None for one scale a row; "default" for what
            `qins.default_group_size` says of in_features.
        device: of the buffers and the bias.
        dtype: of the bias; `weight` is decoded to it.

    """

    codec: str
    group_size: int | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codec: str = "log8",
        group_size: int | str | None = "default",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros, for `load_state_dict` to fill; `from_linear` encodes an existing layer."""
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.in_features, self.out_features = in_features, out_features
        self.codec, self.group_size = codec, resolve_group_size(codec, group_size, in_features)
        self._names = field_names(codec, self.group_size)
        self._dtype = dtype or torch.get_default_dtype()
        shape = (out_features, in_features)
        if torch.device(device or torch.get_default_device()).type == "meta":
            for name, s in field_shapes(codec, shape, self.group_size).items():
                self.register_buffer(name, torch.empty(s, dtype=FIELD_DTYPES[name], device="meta"))
            for name in SCALARS[codec]:
                self.register_buffer(name, torch.empty((), dtype=torch.float32, device="meta"))
        else:
            self._set_codes(encode(np.zeros((1, 1), np.float32), codec), shape, device)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=self._dtype, device=device))
        else:
            self.register_parameter("bias", None)

    def _set_codes(self, zero: EncodedArray, shape: tuple[int, int], device: Any) -> None:
        """Fill the buffers with the codes that `zero`, one encoded zero, repeats over the matrix."""
        for name, s in field_shapes(self.codec, shape, self.group_size).items():
            value = 0 if name in ("sign_bits", "group_scale") else zero.fields[name].item()
            self.register_buffer(name, torch.full(s, value, dtype=FIELD_DTYPES[name], device=device))
        for name in SCALARS[self.codec]:
            self.register_buffer(name, torch.tensor(zero.fields[name].item(), dtype=torch.float32, device=device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        codec: str = "log8",
        *,
        group_size: int | str | None = "default",
        mu: float | None = None,
    ) -> QINSLinear:
        """Encode a layer's weight. The bias is the same Parameter, not a copy.

        Raises:
            TypeError: `linear` is not an nn.Linear with a floating-point weight.
            ValueError: a weight is NaN or infinite.

        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, QINSLinear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        size = resolve_group_size(codec, group_size, linear.in_features)
        encoded = None if weight.device.type == "meta" else encode(weight, codec, group_size=size, mu=mu)
        return cls.from_encoded(linear, encoded, codec, size)

    @classmethod
    def from_encoded(
        cls, linear: nn.Linear, encoded: EncodedArray | None, codec: str, group_size: int | None
    ) -> QINSLinear:
        """Wrap codes that stand for linear's weight; None makes a layer on the meta device."""
        weight = linear.weight
        new = cls(
            linear.in_features, linear.out_features, bias=False, codec=codec, group_size=group_size,
            device="meta", dtype=weight.dtype,
        )  # fmt: skip
        if encoded is not None:
            for name in field_names(codec, group_size):
                new._buffers[name] = torch.from_numpy(encoded.fields[name]).to(weight.device)
        new.bias = linear.bias
        new.train(linear.training)
        return new

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight, (out_features, in_features), made anew at each access; changing it changes nothing."""
        return decode_fields(self.codec, dict(self._buffers), self.group_size, self._dtype)  # type: ignore[arg-type]

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError("weight of a QINSLinear is decoded from its codes; QINSLinear.from_linear makes new codes")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; refuses `weight`, which is decoded from the codes."""
        if name == "weight":
            type(self).weight.fset(self, param)  # type: ignore[attr-defined]
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Refuse: there is no float weight to initialise."""
        raise RuntimeError("a QINSLinear cannot be re-initialised; initialise an nn.Linear and encode it")

    @property
    def encoded(self) -> EncodedArray:
        """The codes as an EncodedArray over the same memory (CPU only), every field checked."""
        fields = {n: self._buffers[n].detach().numpy() for n in self._names}  # type: ignore[union-attr]
        return EncodedArray.from_fields(self.codec, fields, self.group_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input @ W.T + bias in the input's dtype; input is (..., in_features)."""
        device = "cpu" if input.is_cpu else input.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        # through the dictionaries: a module's attribute look-up costs a tenth of a small layer's time
        buffers, bias = self._buffers, self._parameters["bias"]
        fields: list[torch.Tensor] = [buffers[n] for n in self._names]  # type: ignore[misc]
        y = multiply(input, fields, self.codec, self.group_size)
        return y if bias is None else y + bias.to(y.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QINSLinear:
        """As nn.Module's, except that float32 codes keep their bits."""
        with floats_as_bits(self, self._names):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # keep the format's dtypes: copy_ would otherwise convert, say, a float `stored` silently
        for name in self._names:
            value, own = state_dict.get(prefix + name), self._buffers[name]
            if isinstance(value, torch.Tensor) and own is not None and value.dtype != own.dtype:
                raise TypeError(f"{prefix}{name}: expected dtype {own.dtype}, got {value.dtype}")
        if prefix + "weight" in state_dict and prefix + self._names[0] not in state_dict:
            raise RuntimeError(
                f"{prefix}weight: expected codes ({', '.join(self._names)}), got a float "
                "weight; load it into an nn.Linear and use QINSLinear.from_linear"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """in_features, out_features, bias, codec and group_size."""
        group = f", group_size={self.group_size}" if self.group_size else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"codec={self.codec}{group}"
        )
