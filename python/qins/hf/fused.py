"""What layers compute between their products in calls that are no decode steps, in one operation of the core each.

A prefill and a batch that is too large for a step run a layer's own forward. In it, a norm is six operations of torch,
a gate two and rotary embedding ten; in bfloat16 they take as long as a small model's products.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from types import FunctionType
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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Return x, (batch, heads, tokens, head_dim), rotated as transformers' models do, or None if the core cannot.

    Every product and sum is rounded to the dtype, so the result is the same bit for bit.
    """
    if x.dim() != 4 or cos.dim() != 3 or x.numel() == 0:
        return None
    y = torch.empty_like(x)
    batch, heads, tokens, dim = x.shape
    of_batch, of_heads, of_tokens, of_dim = x.stride()
    strides = y.stride()
    shape = (1 if cos.shape[0] == 1 else batch, tokens, dim)
    if (of_dim, strides[3], dim % 2) != (1, 1, 0) or strides[1] != of_heads or cos.shape != shape or sin.shape != shape:
        return None
    _core.rotate_at(
        DTYPE_NUMBER[x.dtype], x.data_ptr(), y.data_ptr(), cos.data_ptr(), sin.data_ptr(), batch, tokens, heads,
        dim // 2, of_heads, of_batch, of_tokens, strides[0], strides[2], 0 if len(cos) == 1 else tokens * dim,
        get_num_threads(),
    )  # fmt: skip
    return y


def _fused_rotation(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        alike = all(type(t) is Tensor and t.is_cpu and t.dtype is q.dtype for t in (q, k, cos, sin))
        if alike and q.dtype in TOLERANCE and not args and not kwargs and may_replace():
            cos, sin = cos.contiguous(), sin.contiguous()
            if (of_q := _rotate(q, cos, sin)) is not None and (of_k := _rotate(k, cos, sin)) is not None:
                return of_q, of_k
        return own(q, k, cos, sin, *args, **kwargs)

    rotate.__dict__["_qins_wrapped"] = True
    return rotate


def _rotates_in_halves(own: Callable[..., Any], fused: Callable[..., Any]) -> bool:
    """Return whether a function computes rotary embedding as the core does."""

    def numbers(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), dtype=torch.float32, device="cpu").reshape(shape).sin()

    q, k, cos, sin = numbers(2, 3, 5, 8), numbers(2, 1, 5, 8) - 0.1, numbers(2, 5, 8) + 0.3, numbers(2, 5, 8) - 0.2
    with torch.no_grad():
        for dtype in TOLERANCE:
            given = [t.to(dtype) for t in (q, k, cos, sin)]
            try:
                pairs = [*zip(own(*given), fused(*given), strict=True)]
            except (IndexError, RuntimeError, TypeError, ValueError):  # of a function that takes something else
                return False
            if not all(torch.equal(a, b) for a, b in pairs):
                return False
    return True


def _fuse_rotation(attention: nn.Module) -> None:
    """Let the core rotate queries and keys in a class's attention, of all models: the results are torch's.

    Some versions of transformers keep the function in each module, which could not be pickled without its name.
    """
    there: Any = sys.modules[type(attention).__module__]
    own = getattr(there, "apply_rotary_pos_emb", None)
    if type(own) is not FunctionType or own.__dict__.get("_qins_wrapped"):
        return
    if any(value is own for module in attention.modules() for value in vars(module).values()):
        return
    fused = _fused_rotation(own)
    if _rotates_in_halves(own, fused):
        there.apply_rotary_pos_emb = fused
    else:
        own.__dict__["_qins_wrapped"] = True


def fuse(module: nn.Module) -> None:
    """Let the core compute a module, or part of it: an RMS norm, a gated MLP or attention of a supported family."""
    children = {*module._modules}
    if is_reviewed(type(module), "RMSNorm"):
        replace(module, FusedNorm())
    elif is_reviewed(type(module), "MLP") and ({"gate_proj", "up_proj"} <= children or "gate_up_proj" in children):
        replace(module, FusedGate())
    elif is_reviewed(type(module), "Attention"):
        _fuse_rotation(module)
