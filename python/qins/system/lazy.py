"""Module attributes that import their submodule on first access."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .extras import naming_extras


def lazily(module: str, places: Mapping[str, str], package: str | None = None) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module.

    The returned function raises AttributeError for a name that is not in `places`, and ImportError where an extra is
    missing; the message names the extra.

    Args:
        module: name of the module.
        places: attribute to the submodule of `package` that defines it and may need an optional package.
        package: None for the module itself.

    Returns:
        a function from an attribute's name to its value.

    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        with naming_extras():
            value = getattr(importlib.import_module(f"{package or module}.{places[name]}"), name)
        setattr(sys.modules[module], name, value)
        return value

    return get
