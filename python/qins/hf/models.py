"""Finding and loading the float model for a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..system import naming_file, read_json, uninterrupted


def require_transformers() -> Any:
    """Import transformers, or raise an ImportError that names the extra to install."""
    try:
        import transformers
    except ImportError as e:
        raise ImportError("this part of qins needs transformers: pip install 'qins[hf]'") from e
    return transformers


def model_class(name: Any) -> Any:
    """Return transformers' class of this name; None if it is not a model's, since anything else could be called."""
    import transformers

    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def not_found(name: str | Path, error: Exception) -> FileNotFoundError:
    """Return the error for a name that is neither a directory nor an available model on the hub."""
    return FileNotFoundError(f"{name}: neither a directory nor an available model on the hub: {error}")


@contextmanager
def loading(what: str, where: str | Path) -> Iterator[None]:
    """Turn what other libraries raise for damaged files, such as a KeyError, into a ValueError that names the files.

    Errors that the command line shows as they are pass unchanged.
    """
    try:
        with naming_file(where):
            yield
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError):
        raise
    except Exception as e:
        said = " ".join(str(e).split()) or "no message"
        raise ValueError(f"{where}: expected {what}: {type(e).__name__}: {said}") from e


def read_config(name: str) -> dict[str, Any]:
    """Return the config.json of a directory or hub name.

    Raises:
        FileNotFoundError: there is no such model, or no config.json in the directory.
        ValueError: config.json isn't a JSON object.

    """
    from huggingface_hub import hf_hub_download

    path = Path(name) / "config.json"
    if not Path(name).exists():
        try:
            path = Path(hf_hub_download(name, "config.json"))
        except Exception as e:
            raise not_found(name, e) from None
    elif not path.is_file():
        raise FileNotFoundError(f"{name}: expected the directory of a model, found no config.json in it")
    return read_json(path)


def require_causal_lm(name: str) -> None:
    """Check that a model is a causal language model, from its config.json alone.

    `AutoModelForCausalLM` also accepts Whisper, for its decoder, and adds a random head to BERT.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it has another architecture.

    """
    config = read_config(name)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    known = {a for v in NAMES.values() for a in ((v,) if isinstance(v, str) else v)}
    remote = config.get("auto_map")
    found = config.get("architectures")
    if not isinstance(found, list) or not found:
        found, fits = [f"model_type {config.get('model_type')!r}"], config.get("model_type") in list(NAMES)
    else:
        fits = any(a in known or str(a).endswith("ForCausalLM") for a in map(str, found))
    if not fits and not (isinstance(remote, dict) and "AutoModelForCausalLM" in remote):
        raise ValueError(
            f"{name}: expected a causal language model, config.json has the architecture {', '.join(map(str, found))}"
        )


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a directory or hub name.

    Raises:
        ValueError: a file of a directory is no JSON object; the error names it.

    """
    with loading("the files of a tokenizer", name):
        try:
            return require_transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as e:  # transformers may try other kinds of tokenizers, and name a package that they lack
            for pattern in ("config.json", "tokenizer*.json", "vocab.json", "*_tokens*.json"):
                for path in sorted(Path(name).glob(pattern)):
                    read_json(path)
            if isinstance(e, ValueError) and name not in str(e):
                raise ValueError(f"{name}: expected the files of a tokenizer: {e}") from e
            raise


def load_causal_lm(name: str) -> tuple[Any, Any]:
    """Return (model in float32 and eval mode, tokenizer) of a directory or hub name.

    Raises:
        FileNotFoundError, ValueError: see `require_causal_lm`.

    """
    import torch

    transformers = require_transformers()
    require_causal_lm(name)
    tokenizer = load_tokenizer(name)
    with loading("the checkpoint of a causal language model", name):
        model = uninterrupted(
            lambda: transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=False
            )
        )
    return model.eval(), tokenizer
