"""The rational codec on torch tensors."""

from __future__ import annotations

from typing import Any

import torch

from .rational_arrays import check_finite, codes_of, decode_array, project


class RationalTensor(torch.Tensor):
    """Codes of z, uint8, with the range of |z| that they cover; results of operations on them keep it.

    Attributes:
        z_min, z_max: ends of the range of |z|: level m stands for |z| = z_max - m/127 (z_max - z_min).

    """

    z_min: float
    z_max: float

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; results that are still codes keep the range."""
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if not isinstance(result, RationalTensor):
            return result
        source = next((a for a in args if isinstance(a, RationalTensor) and hasattr(a, "z_min")), None)
        if result.dtype != torch.uint8 or source is None:
            return result.as_subclass(torch.Tensor)
        result.z_min, result.z_max = source.z_min, source.z_max
        return result

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        copied = self.clone()
        memo[id(self)] = copied
        return copied


def encode_tensor(weight: torch.Tensor, alpha: float, quantize: bool) -> torch.Tensor:
    """`qins_encode` for a tensor."""
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
    if not quantize:
        array = weight.detach().cpu().float().numpy()
        check_finite("weight", array)
        return torch.from_numpy(project(array, alpha, back=False)).to(weight.device)
    e = codes_of(weight, alpha)
    codes = torch.from_numpy(e.fields["w_encoded"]).to(weight.device).as_subclass(RationalTensor)
    codes.z_min, codes.z_max = float(e.fields["z_min"]), float(e.fields["z_max"])
    return codes


def decode_tensor(encoded: torch.Tensor, alpha: float, is_quantized: bool) -> torch.Tensor:
    """`qins_decode` for a tensor."""
    array = encoded.detach().cpu().as_subclass(torch.Tensor)
    values = array.float() if array.dtype.is_floating_point else array
    z_min, z_max = getattr(encoded, "z_min", None), getattr(encoded, "z_max", None)
    return torch.from_numpy(decode_array(values.numpy(), z_min, z_max, alpha, is_quantized)).to(encoded.device)
