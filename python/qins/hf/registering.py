"""Registering quant_method "qins" with transformers, and loading models saved with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)

from ..files import source_quantization
from ..nn import CodedWeight, after_conversion
from ..system import naming_file
from .config import QinsConfig
from .decoding import decode_in_steps
from .embeddings import untie
from .models import model_class
from .quantizer import QinsHfQuantizer
from .released import require_encodable
from .saving import prepare_saving


def attach(model: nn.Module) -> None:
    """Attach the config and quantizer to a model that `qins.convert` changed, so that it can be saved and loaded."""
    if isinstance(model, transformers.PreTrainedModel):
        _attach(model)


def _attach(model: Any) -> None:
    quantizer = QinsHfQuantizer(QinsConfig(), pre_quantized=True)
    untie(model, {n for n, m in model.named_modules() if isinstance(m, CodedWeight)})
    quantizer.audit(model)
    prepare_saving(model)
    decode_in_steps(model)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = True
    model.quantization_method = "qins"


def load(path: str | Path, *, verify: bool = False, **kwargs: Any) -> Any:
    """Load a quantized model as an instance of its own class.

    Args:
        path: directory or hub name.
        verify: first check every tensor against its checksum, which reads all of the files.
        **kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: it was not saved by qins, or differs from what was saved.

    """
    with naming_file(path):
        return _load(path, kwargs | ({"quantization_config": QinsConfig(verify=True)} if verify else {}))


def _load(path: str | Path, kwargs: dict[str, Any]) -> Any:
    told, _ = transformers.PretrainedConfig.get_config_dict(path)
    about = told.get("quantization_config") or {}
    if not isinstance(about, dict):
        raise ValueError(f"{path}: quantization_config: expected an object, got {about!r}")
    method = about.get("quant_method")
    if method != "qins":
        raise ValueError(f"{path}: expected a checkpoint with quant_method 'qins', got {method!r}")
    names = told.get("architectures")
    if not names:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        names = config.architectures or ["AutoModel"]
    cls = model_class(names[0]) if isinstance(names, list) else None
    if names == ["AutoModel"]:
        cls = transformers.AutoModel
    if cls is None:
        raise ValueError(f"{path}: architectures: expected a list of classes of transformers, got {names!r}")
    return cls.from_pretrained(path, **kwargs)


def register() -> None:
    """Register quant_method "qins" with transformers; repeated calls are harmless."""
    if "qins" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("qins")(QinsConfig)
    after_conversion["transformers"] = attach
    if "qins" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("qins")(QinsHfQuantizer)
        _merge_loading_attributes()


def _merge_loading_attributes() -> None:
    """Make transformers accept a QinsConfig for codes, to set how they load, and for 8-bit or 4-bit checkpoints.

    transformers does the former only for a closed list of its own classes.
    """
    merge = AutoHfQuantizer.merge_quantization_configs

    def merged(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if not isinstance(given, QinsConfig):
            return merge(quantization_config, given)
        stated = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        if released := source_quantization({"quantization_config": stated}):
            require_encodable(released)
            given.released = released  # the quantizer reads it
            return given
        # warns that the other attributes of `given` are ignored
        result = merge(quantization_config, given if given.to_dict() != QinsConfig().to_dict() else None)
        if isinstance(result, QinsConfig):
            vars(result).update(given.get_loading_attributes())
        return result

    AutoHfQuantizer.merge_quantization_configs = staticmethod(merged)  # type: ignore[method-assign]


register()
