"""Which extra brings a package that is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

# Top-level module: the extra of pyproject.toml that declares it.
EXTRAS = {
    "torch": "torch",
    "transformers": "hf",
    "safetensors": "hf",
    "gguf": "hf",
    "accelerate": "hf",
    "huggingface_hub": "hf",
    "typer": "cli",
    "rich": "cli",
    "matplotlib": "plot",
    "jinja2": "plot",
}


@contextmanager
def naming_extras() -> Iterator[None]:
    """Say which extra to install where an optional package is missing; a decorator, too.

    Raises:
        ImportError: a package of EXTRAS is not installed.

    """
    try:
        yield
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise _missing(package) from e


def require(*packages: str) -> None:
    """Check, without importing them, that packages are installed: before work whose last step needs them.

    Raises:
        ImportError: one is not; the message names its extra.

    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise _missing(package)


def _missing(package: str) -> ImportError:
    return ImportError(f"this needs {package}: pip install 'qins[{EXTRAS[package]}]'", name=package)
