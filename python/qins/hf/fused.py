"""RMS norms and gated MLPs in calls that are no decode steps: each in one operation of the core instead of several.

A prefill, a batch that is too large for a step, and continuous batching run a layer's own forward. In it, a norm is six
operations of torch and a gate two, which in bfloat16 take as long as the products of a small model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import _core
from ..codec import DTYPE_NUMBER
from ..system import get_num_threads
from .layer_description import activation_of, is_reviewed, norm_of
from .replacing import TOLERANCE, Replacement, UnfitError, agree, may_replace, replace

Tensor = torch.Tensor


class _Fused(Replacement):
    key = "_qins_fused"

    def __init__(self) -> None:
        self.known: tuple[Any, ...] | None = None

    def without(self, module: Any) -> str:
        """Return what happens without this, for the log."""
        return f"a {type(module).__name__} computes with its own operations"


def _may_fuse(x: Tensor, given: dict[str, Any]) -> bool:
    return x.is_cpu and x.dtype in TOLERANCE and x.numel() > 0 and not given and may_replace()


class FusedNorm(_Fused):
    """Computes an RMS norm."""

    def run(self, norm: nn.Module, own: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        """Return what the norm returns for x, (..., features), or None if its own forward must run.

        Raises:
            UnfitError: it is no RMS norm, or its weight cannot be watched.

        """
        if not _may_fuse(x, given) or not x.is_contiguous():
            return None
        weight: Any = norm._parameters.get("weight")
        if self.known is None or self.known[0] is not weight or self.known[1] != weight._version:
            factor, epsilon = norm_of(norm)
            if weight.is_inference():
                raise UnfitError("its weight is an inference tensor")
            factor = factor.contiguous()
            self.known = weight, weight._version, factor, factor.data_ptr(), epsilon
        _, _, factor, at, epsilon = self.known
        n = factor.numel()
        if x.shape[-1] != n or weight.dtype is not x.dtype:
            return None
        y = torch.empty_like(x)
        _core.norm_at(
            DTYPE_NUMBER[x.dtype], x.data_ptr(), x.numel() // n, n, at, epsilon, y.data_ptr(), get_num_threads()
        )
        return y


class FusedGate(_Fused):
    """Computes the gate of a gated MLP; its projections remain modules."""

    def run(self, mlp: nn.Module, own: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        """Return what the MLP returns for x, (..., features), or None if its own forward must run.

        Raises:
            UnfitError: it has an activation that the core does not support.

        """
        modules: dict[str, Any] = mlp._modules
        act: Any = modules.get("act_fn") or modules.get("activation_fn")
        if not _may_fuse(x, given) or act is None or act._forward_hooks or act._forward_pre_hooks:
            return None
        if self.known is None or self.known[0] is not act:
            self.known = act, activation_of(mlp), set()
        _, activation, proved = self.known
        got = modules["down_proj"](_gated(modules, activation, x))
        if x.dtype not in proved:
            want = own(mlp, x)
            if not bool(torch.isfinite(want).all()):  # NaN or infinity cannot be compared
                return want
            if got.dtype is not want.dtype or not agree(got, want, TOLERANCE[want.dtype]):
                raise UnfitError("its results differ")
            proved.add(x.dtype)
        return got


def _gated(modules: Any, activation: int, x: Tensor) -> Any:
    """Return activation(gate) * up."""
    if "gate_up_proj" in modules:
        both = modules["gate_up_proj"](x).contiguous()
        next_row, n = both.shape[-1], both.shape[-1] // 2
        gate, gate_at, up_at = both, both.data_ptr(), both.data_ptr() + n * both.element_size()
    else:
        gate, up = modules["gate_proj"](x).contiguous(), modules["up_proj"](x).contiguous()
        next_row = n = gate.shape[-1]
        gate_at, up_at = gate.data_ptr(), up.data_ptr()
        if up.dtype is not gate.dtype or up.shape != gate.shape:
            raise UnfitError("its projections differ in kind")
    if gate.dtype not in TOLERANCE:
        raise UnfitError(f"its projections are {gate.dtype}")
    y = gate.new_empty(*gate.shape[:-1], n)
    _core.gate_at(
        DTYPE_NUMBER[gate.dtype], gate_at, up_at, next_row, gate.numel() // next_row, n, activation, y.data_ptr(),
        get_num_threads(),
    )  # fmt: skip
    return y


def fuse(module: nn.Module) -> None:
    """Let the core compute a module if it is an RMS norm or a gated MLP of a supported family."""
    children = {*module._modules}
    if is_reviewed(type(module), "RMSNorm"):
        replace(module, FusedNorm())
    elif is_reviewed(type(module), "MLP") and ({"gate_proj", "up_proj"} <= children or "gate_up_proj" in children):
        replace(module, FusedGate())
