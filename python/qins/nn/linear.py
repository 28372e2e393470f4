"""QINSLinear: torch's linear layer with a quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..codec import EncodedArray, encode, resolve_group_size, warn_if_slow
from .coded import CodedWeight
from .ops import multiply


class QINSLinear(CodedWeight, nn.Linear):
    """A linear layer that stores its weight as logarithmic codes and computes y = x @ W.T + bias from them.

    The codes are buffers with the field names of docs/formats.md (for `golden`: stored, sign, log_min, log_max). They
    are frozen. `bias` stays a trainable parameter, and gradients flow to the input. Scales and ranges stay float32
    through every `.to(dtype)`.

    Args:
        in_features: K, size of the last dimension of the input.
        out_features: N, size of the last dimension of the output.
        bias: whether the layer has a bias.
        codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".
        group_size: inputs per group scale; "default" for 64 (log8) or 32 (log6, log5, log4); None for per-row scales
            only (log8).
        device: of the buffers and the bias.
        dtype: of the bias and of the dequantized `weight`.

    """

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
        """Make a layer of zeros, to be filled by `load_state_dict`; `from_linear` quantizes an existing layer."""
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.in_features, self.out_features = in_features, out_features
        self._make_codes((out_features, in_features), codec, group_size, device, dtype)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=self._dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        codec: str = "log8",
        *,
        group_size: int | str | None = "default",
        mu: float | None = None,
    ) -> QINSLinear:
        """Quantize a layer. The bias is the same Parameter, not a copy.

        Args:
            linear: the float layer.
            codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".
            group_size: as in the constructor.
            mu: curvature of log8's levels; None searches for the best value.

        Returns:
            the quantized layer.

        Raises:
            TypeError: `linear` is not an nn.Linear with a floating-point weight.
            ValueError: a weight is NaN or infinite.

        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, QINSLinear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        size = resolve_group_size(codec, group_size, linear.in_features)
        warn_if_slow(codec, size)
        encoded = None if weight.device.type == "meta" else encode(weight, codec, group_size=size, mu=mu)
        return cls.from_encoded(linear, encoded, codec, size)

    @classmethod
    def from_encoded(
        cls, linear: nn.Linear, encoded: EncodedArray | None, codec: str, group_size: int | None
    ) -> QINSLinear:
        """Wrap the codes of linear's weight; None makes a layer on the meta device."""
        weight = linear.weight
        new = cls(
            linear.in_features, linear.out_features, bias=False, codec=codec, group_size=group_size,
            device="meta", dtype=weight.dtype,
        )  # fmt: skip
        if encoded is not None:
            new._take_codes(encoded, weight.device)
        new.bias = linear.bias
        new.train(linear.training)
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input @ W.T + bias in the input's dtype; input is (..., in_features)."""
        device = "cpu" if input.is_cpu else input.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        # through the dictionaries: attribute lookup on a module costs a tenth of a small layer's time
        buffers, bias = self._buffers, self._parameters["bias"]
        fields: list[torch.Tensor] = [buffers[n] for n in self._names]  # type: ignore[misc]
        y = multiply(input, fields, self.codec, self.group_size)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """in_features, out_features, bias, codec and group_size."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._codec_repr()}"
        )
