"""The rational codec in models: the prototype's layer and conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..codec import (
    DEFAULT_TARGETS,
    check_alpha,
    codes_of,
    decode_fields,
    decode_tensor,
    dtype_name,
    encode_tensor,
    warn_deprecated,
)
from .coded import floats_as_bits
from .ops import multiply

_NAMES = ("w_encoded", "alpha", "z_min", "z_max")


class QINSWeightLinear(nn.Module):
    """A linear layer that stores its weight as rational codes; the prototype's class of that name.

    Args:
        linear: the layer to encode; its bias is shared.
        alpha: slope of the codec.
        quantize: one byte per weight (`w_encoded` is uint8, with z_min and z_max beside it) instead of float32.

    """

    def __init__(self, linear: nn.Linear, alpha: float = 1.0, quantize: bool = True) -> None:
        warn_deprecated("QINSWeightLinear")
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        alpha, self.quantize = check_alpha(alpha), bool(quantize)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if quantize:
            e = codes_of(linear.weight, alpha)
            for name in _NAMES:
                self.register_buffer(name, torch.from_numpy(e.fields[name]).to(linear.weight.device))
        else:
            self.register_buffer("w_encoded", encode_tensor(linear.weight, alpha, quantize=False))
            self.register_buffer("alpha", torch.tensor(alpha))
        self.bias = linear.bias
        self.train(linear.training)

    def decode_weight(self) -> torch.Tensor:
        """Return the dequantized weight, a new float32 tensor (out_features, in_features) at each call."""
        if not self.quantize:
            return decode_tensor(self.get_buffer("w_encoded"), float(self.get_buffer("alpha")), False)
        return decode_fields("rational", dict(self._buffers), None, torch.float32)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ W.T + bias in x's dtype; x is (..., in_features)."""
        if self.quantize:
            fields: list[torch.Tensor] = [self._buffers[n] for n in _NAMES]  # type: ignore[misc]
            y = multiply(x, fields, "rational", None)
        else:
            y = nn.functional.linear(x, self.decode_weight().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QINSWeightLinear:
        with floats_as_bits(self, self._buffers):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """in_features, out_features, bias, alpha and whether the codes are bytes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"alpha={float(self.get_buffer('alpha')):g}, quantize={self.quantize}"
        )


def convert_linear_to_qins(
    model: nn.Module,
    target_names: Iterable[str] | None = None,
    alpha: float = 1.0,
    verbose: bool = True,
    *,
    quantize: bool = True,
) -> nn.Module:
    """Replace every nn.Linear whose name contains one of `target_names` by a QINSWeightLinear, in place.

    Args:
        model: the model; it is returned.
        target_names: parts of names; None for v_proj, o_proj, gate_proj, up_proj and down_proj.
        alpha: slope of the codec.
        verbose: print what was replaced.
        quantize: one byte per weight.

    """
    warn_deprecated("convert_linear_to_qins")
    targets = [target_names] if isinstance(target_names, str) else list(target_names or DEFAULT_TARGETS)
    made: dict[nn.Module, QINSWeightLinear] = {}
    before = after = 0
    for name, module in list(model.named_modules()):
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if not isinstance(child, nn.Linear) or not any(t in path for t in targets):
                continue
            if child not in made:
                made[child] = QINSWeightLinear(child, alpha, quantize)
                before += child.weight.numel() * child.weight.element_size()
                after += sum(b.numel() * b.element_size() for b in made[child].buffers())
                if verbose:
                    print(f"  {path}: {tuple(child.weight.shape)}")
            module._modules[key] = made[child]
    if verbose:
        ratio = f", {before / after:.2f}x" if after else ""
        print(f"converted {len(made)} layers, {before:,} to {after:,} bytes{ratio}")
    return model


def verify_qins_layer(
    linear: nn.Linear, qins_layer: QINSWeightLinear, x: torch.Tensor | None = None, tolerance: float = 1e-2
) -> dict[str, Any]:
    """Compare an encoded layer with its original.

    Args:
        linear: the original.
        qins_layer: its QINSWeightLinear.
        x: inputs (..., in_features); None for 16 rows of a fixed normal sample.
        tolerance: largest relative RMS error of the outputs that passes.

    Returns:
        dict: max_weight_error, weight_snr_db, output_relative_error, signs_preserved, bytes_per_weight, passed.

    """
    dtype_name(linear.weight.dtype)
    w = linear.weight.detach().float()
    d = qins_layer.decode_weight()
    if x is None:
        x = torch.randn(16, linear.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, z = linear(x.to(linear.weight.dtype)).double(), qins_layer(x).double()
    noise = (w - d).double().pow(2).sum()
    error = float((y - z).norm() / y.norm().clamp_min(1e-30))
    stored = sum(b.numel() * b.element_size() for b in qins_layer.buffers())
    return {
        "max_weight_error": float((w - d).abs().max()) if w.numel() else 0.0,
        "weight_snr_db": float(10 * torch.log10(w.double().pow(2).sum() / noise)) if noise > 0 else float("inf"),
        "output_relative_error": error,
        "signs_preserved": float(((w < 0) == (d < 0))[d != 0].float().mean()) if w.numel() else 1.0,
        "bytes_per_weight": stored / max(w.numel(), 1),
        "passed": error <= tolerance,
    }
