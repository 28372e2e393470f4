"""The instruction set that the core uses."""

from __future__ import annotations

import os

from .. import _core


def isas() -> tuple[str, ...]:
    """Return the names of the instruction sets that run on this machine, best first."""
    return _core.isas()


def isa() -> str:
    """Return the name of the instruction set in use."""
    return _core.isa()


class use_isa:  # noqa: N801 - used as a function or a context manager
    """Use an instruction set in the whole process, from now on or within a `with` block.

    Codes and dequantized values are the same on every instruction set. Speed differs, and products differ within their
    documented error.

    Args:
        name: one of `qins.isas()`.

    Raises:
        ValueError: `name` is unknown or does not run here; the message lists those that do.

    """

    def __init__(self, name: str) -> None:
        self._before = _core.isa()
        _core.set_isa(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        _core.set_isa(self._before)


def _from_environment() -> None:
    name = os.environ.get("QINS_ISA")
    if name:
        try:
            _core.set_isa(name)
        except ValueError as e:
            raise ImportError(f"environment variable QINS_ISA: {e}") from None


_from_environment()
