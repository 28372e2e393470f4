"""Modules that the core computes where it can: what decode steps and fused operations share."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from ..nn import is_watched

logger = logging.getLogger("qins")

Tensor = torch.Tensor

# Relative error allowed between the core and the modules, which round to the dtype after each operation.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class UnfitError(Exception):
    """A module computes something that the core does not support."""


class Replacement(ABC):
    """Computes a module's results; what it needs to know of the module, it reads on first use.

    Copies and pickles are empty.

    Attributes:
        key: where a module has its replacement, in its dictionary.

    """

    key: ClassVar[str]

    def __reduce__(self) -> Any:
        return type(self), ()

    @abstractmethod
    def run(self, module: Any, own: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        """Return what the module returns for x and keyword arguments, or None if its own forward must run.

        Raises:
            UnfitError: the core cannot compute this module at all.

        """

    @abstractmethod
    def without(self, module: Any) -> str:
        """Return what happens without this replacement, for the log."""

    def give_up(self, module: Any, why: object) -> None:
        """Leave the module to its own forward from now on."""
        module.__dict__[self.key] = None
        logger.info("qins: %s: %s", self.without(module), why)


def replace(module: nn.Module, replacement: Replacement) -> None:
    """Let a replacement compute a module where it can."""
    kind: Any = type(module)
    if not kind.forward.__dict__.get("_qins_wrapped"):
        kind.forward = _wrapped(kind.forward, replacement.key)
    module.__dict__[replacement.key] = replacement


def _wrapped(forward: Callable[..., Any], key: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        replacement: Replacement | None = self.__dict__.get(key)
        if replacement is not None and len(args) == 1 and type(args[0]) is Tensor:
            try:
                result = replacement.run(self, forward, args[0], kwargs)
            except UnfitError as e:
                replacement.give_up(self, e)
                result = None
            if result is not None:
                return result
        return forward(self, *args, **kwargs)

    wrapped.__dict__["_qins_wrapped"] = True
    return wrapped


def may_replace() -> bool:
    """Return whether the core may compute something in place of torch: nothing needs torch's own operations."""
    return not (torch.is_grad_enabled() or is_watched() or torch.is_autocast_enabled("cpu"))


def agree(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Return whether two results differ by at most this part of the second one's norm."""
    if got.shape != want.shape:
        return False
    return bool((got - want).float().norm() <= tolerance * want.float().norm())


def agree_as_sums(got: Tensor, want: Tensor, x: Tensor, tolerance: float) -> bool:
    """Return whether what two results added to x differs by at most this part of the second one's norm.

    What rounding the sums changes does not count: a layer's modules round two sums, a step one. A few elements of the
    hidden states of many models are hundreds of times as large as the rest, so that in bfloat16 their rounding alone
    may be more than all that a layer adds.
    """
    if got.shape != want.shape:
        return False
    x, got, rounded = x.float(), got.float(), want.float()
    rounding = 1.5 * torch.finfo(want.dtype).eps * torch.maximum(x.abs(), rounded.abs())
    beyond = ((got - rounded).abs() - rounding).clamp(min=0)
    return bool(beyond.norm() <= tolerance * (rounded - x).norm())
