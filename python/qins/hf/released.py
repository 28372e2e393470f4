"""Loading checkpoints released in 8 or 4 bits with transformers, with their weights dequantized."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from ..files import (
    DTYPE_CODES,
    Checkpoint,
    RestoredCheckpoint,
    exact_bytes,
    exact_name,
    open_checkpoint,
    open_scaled,
    require_decodable,
    source_quantization,
)
from ..system import uninterrupted
from .models import not_found

_VERSION = int(transformers.__version__.partition(".")[0])


class DecodedWhenRead:
    """A tensor that is decoded when read. It replaces safetensors' slices, which transformers 5 reads one by one."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Decode the tensor and return a part of it."""
        return self._checkpoint.load(self._name)[index]

    def get_shape(self) -> list[int]:
        """Return the shape of the decoded tensor."""
        return list(self._checkpoint.tensors[self._name].shape)

    def get_dtype(self) -> str:
        """Return safetensors' name of the dtype."""
        return DTYPE_CODES[self._checkpoint.tensors[self._name].dtype]


def decoded_state(checkpoint: Checkpoint) -> dict[str, DecodedWhenRead]:
    """Return a state dict whose tensors are decoded when transformers 5 reads them."""
    return {name: DecodedWhenRead(checkpoint, name) for name in checkpoint.tensors}


def require_encodable(told: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint with this quantization can be encoded while transformers loads it.

    Raises:
        ValueError: qins does not decode its format, or this transformers cannot read a state dict tensor by tensor.

    """
    require_decodable(told)
    if _VERSION < 5:
        raise ValueError(
            f"expected float weights, got quant_method {told['quant_method']!r}, which qins cannot decode tensor by "
            f"tensor in transformers {transformers.__version__}; convert the checkpoint with "
            "`qins quantize` and load its output, or use transformers 5"
        )
    _let_quantizers_read()


def open_restored(files: Any, name: str) -> RestoredCheckpoint:
    """Open the original of a checkpoint of codes, to be read while transformers loads it.

    Args:
        files: of the codes.
        name: directory or hub name of the model; from the hub, transformers downloads only the codes.

    Raises:
        FileNotFoundError: nothing beside the files restores it.
        ValueError: this transformers cannot read a state dict tensor by tensor.

    """
    if _VERSION < 5:
        raise ValueError(
            f"restore: transformers {transformers.__version__} reads whole state dicts; restore the files with "
            "`qins restore`, or use transformers 5"
        )
    _let_quantizers_read()
    directory = Path(next(iter(files))).parent
    if not Path(name).exists() and directory.parent.name == "snapshots" and not exact_bytes(directory):
        from huggingface_hub import snapshot_download

        cache = directory.parents[2]
        snapshot_download(name, revision=directory.name, cache_dir=cache, allow_patterns=[exact_name("*")])
    return RestoredCheckpoint(directory)


@functools.cache
def _let_quantizers_read() -> None:
    """Let a quantizer provide the state dict of the files; transformers allows this only for GGUF files."""
    name = "_load_pretrained_model"
    original = inspect.getattr_static(transformers.PreTrainedModel, name)  # a static or a class method
    signature = inspect.signature(original.__func__)

    @functools.wraps(original.__func__)
    def loading(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        floats = getattr(given.arguments["load_config"].hf_quantizer, "floats", None)
        if floats is not None and given.arguments["state_dict"] is None:
            given.arguments["state_dict"] = decoded_state(floats)
        return original.__func__(*given.args, **given.kwargs)

    setattr(transformers.PreTrainedModel, name, type(original)(loading))


def find_source(name: str | Path) -> Path:
    """Return the directory of a checkpoint; download it if it is a hub name.

    Raises:
        FileNotFoundError: there is no such directory, and the hub does not have it either.

    """
    path = Path(name)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.gguf"]))
    except Exception as e:
        raise not_found(name, e) from None


def load_floats(architecture: type[Any], source: str | Path, **kwargs: Any) -> Any:
    """Load a checkpoint with `from_pretrained`; weights released in 8 or 4 bits become floats.

    Args:
        architecture: transformers' class of the model.
        source: directory or hub name.
        **kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: qins does not decode the format of its weights.

    """
    found = transformers.PretrainedConfig.get_config_dict(source)[0]
    told = source_quantization(found)
    if not told:
        kind = architecture.config_class
        if found.get("model_type") == kind.model_type:  # else transformers looks for the model's own part of it
            # transformers, if it looked for the config once more and failed, would build its default model
            kwargs["config"] = kind.from_dict(found)
        return uninterrupted(lambda: architecture.from_pretrained(source, **kwargs))
    source = find_source(source)
    checkpoint = open_scaled(open_checkpoint(source))
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    drop_quantization(config)
    dtype = kwargs.pop("dtype", "auto")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    state: Mapping[str, Any] = decoded_state(checkpoint)
    if _VERSION < 5:  # it needs the whole state dict
        loaded = ((name, checkpoint.load(name)) for name in checkpoint.tensors)
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in loaded}
    config._name_or_path = str(source)
    return architecture.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)


def drop_quantization(config: Any) -> None:
    """Remove the quantization_config from a transformers config, and from the text config in it."""
    for part in (config, config.get_text_config(decoder=True)):
        vars(part).pop("quantization_config", None)
