"""Which cases of a test every run has."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long_but(often: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return all cases, for parametrize: first those in `often`, then those left to `make test-long`."""
    cases = list(cases)
    assert all(case in cases for case in often)
    rest = [pytest.param(case, marks=pytest.mark.long) for case in cases if case not in often]
    return [*often, *rest]
