"""Which extra installs a missing optional package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

# Top-level module to the extra in pyproject.toml that declares it.
EXTRAS = {
    "torch": "torch",
    "transformers": "hf",
    "safetensors": "hf",
    "gguf": "hf",
    "regex": "hf",
    "accelerate": "hf",
    "huggingface_hub": "hf",
    "tokenizers": "cli",
    "typer": "cli",
    "rich": "cli",
    "matplotlib": "plot",
    "jinja2": "plot",
    "fastapi": "serve",
    "uvicorn": "serve",
    "openai": "serve",
    "pydantic": "serve",
    "ray": "ray",
    "fsspec": "ray",
    "s3fs": "ray",
    "gcsfs": "ray",
}


@contextmanager
def naming_extras() -> Iterator[None]:
    """Turn a missing optional package into an ImportError that names its extra; also a decorator.

    Raises:
        ImportError: a package in EXTRAS is not installed.

    """
    try:
        yield
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise _missing(package) from e


def require(*packages: str) -> None:
    """Check that packages are installed, without importing them. For use before long work whose last step needs them.

    Raises:
        ImportError: a package is missing; the message names its extra.

    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise _missing(package)


def _missing(package: str) -> ImportError:
    return ImportError(f"this needs {package}: pip install 'qins[{EXTRAS[package]}]'", name=package)
