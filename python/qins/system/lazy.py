"""Names of a package that import their module when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .extras import naming_extras


def lazily(module: str, places: Mapping[str, str], package: str | None = None) -> Callable[[str], Any]:
    """Return a module's `__getattr__`.

    Args:
        module: name of the module.
        places: name to the submodule of `package` that defines it, which may need an optional package.
        package: the module itself, if None.

    Raises:
        AttributeError: from what is returned, for a name that is not in `places`.
        ImportError: from it, where an extra is not installed; the message names the extra.

    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        with naming_extras():
            value = getattr(importlib.import_module(f"{package or module}.{places[name]}"), name)
        setattr(sys.modules[module], name, value)
        return value

    return get
