"""Released quantized checkpoints as sources of float weights: supported formats and the roles of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from . import compressed_tensors
from .reading import Checkpoint, StoredTensor
from .scaled import ScaledCheckpoint, ScaledWeight, check_scales, is_block, matrix_shape

Found = tuple[dict[str, ScaledWeight], set[str], str]  # weights, keys that are not weights of the model, format


def source_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization settings in the config.json of a checkpoint of another tool; {} for floats and for codes.

    Raises:
        ValueError: they are malformed.

    """
    text = config.get("text_config")
    told: Any = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else {})
    if not told:
        return {}
    if not isinstance(told, dict):
        raise ValueError(f"quantization_config: expected an object, got {told!r}")
    return {} if told.get("quant_method") == "qins" else told


def require_decodable(told: Mapping[str, Any]) -> None:
    """Check that a quantization method is supported as a source.

    Raises:
        ValueError: it is not; the message names the method and says what to do.

    """
    method = told.get("quant_method")
    if not method and (told.get("load_in_8bit") or told.get("load_in_4bit")):
        method = "bitsandbytes"  # early versions do not write quant_method
    if not isinstance(method, str) or method not in _FORMATS:
        raise ValueError(
            f"expected float weights or quant_method {', '.join(map(repr, _FORMATS))}, got {method!r}; quantize the "
            "float model that this checkpoint was made from, or dequantize it first with the library that made it"
        )


def open_scaled(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint of floats: the same one, or, if it is quantized, one that dequantizes tensors when loaded.

    Raises:
        ValueError: its format is not supported, or scales are missing or of the wrong shape.

    """
    try:
        told = source_quantization(checkpoint.config)
        if not told:
            return checkpoint
        require_decodable(told)
        weights, other, source_format = _FORMATS[told["quant_method"]](checkpoint, told)
    except ValueError as e:
        raise ValueError(f"{checkpoint.path}: {e}") from None
    parts = {key for w in weights.values() for key in (w.values, w.scales, w.zero_points) if key}
    tensors: dict[str, StoredTensor] = {}
    where = dict(checkpoint._where)
    by_values = {w.values: name for name, w in weights.items()}
    for key, t in checkpoint.tensors.items():
        name = by_values.get(key, key)
        if name in tensors:
            raise ValueError(f"{checkpoint.path}: {key}: expected no {name} beside it, got both")
        if name in weights:
            about = weights[name]
            keys = [k for k in (about.values, about.scales, about.zero_points) if k]
            size = sum(checkpoint.tensors[k].bytes for k in keys)
            dtype = str(about.dtype).removeprefix("torch.")
            tensors[name] = replace(t, name=name, dtype=dtype, shape=about.decoded_shape, bytes=size)
            where[name] = where[key]
        elif key not in parts and key not in other:
            tensors[key] = t
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    return ScaledCheckpoint(
        checkpoint.path, checkpoint.format, checkpoint.files, tensors, config, checkpoint.metadata, where,
        source=checkpoint, weights=weights, source_format=source_format,
    )  # fmt: skip


def _fp8(checkpoint: Checkpoint, told: Mapping[str, Any]) -> Found:
    """Find FP8 weights as in DeepSeek and Qwen: `weight` in float8_e4m3fn, `weight_scale_inv` per block or tensor."""
    suffix = "_scale_inv"
    size = told.get("weight_block_size")
    if size is not None and not is_block(size):
        raise ValueError(f"weight_block_size: expected two positive numbers, got {size!r}")
    other = {k for k in checkpoint.tensors if k.endswith((suffix, ".activation_scale", ".input_scale"))}
    weights = {}
    for name, t in checkpoint.tensors.items():
        if "float8" not in t.dtype or name in other:
            continue
        if t.dtype != "float8_e4m3fn":
            raise ValueError(f"{name}: expected float8_e4m3fn, got {t.dtype}")
        shape = matrix_shape(t)
        about = ScaledWeight(name, name + suffix, None, shape, (size[0], size[1]) if size else shape)
        check_scales(checkpoint, about)
        weights[name] = about
    return weights, other, "block-scaled FP8" if size else "FP8"


def _mxfp4(checkpoint: Checkpoint, told: Mapping[str, Any]) -> Found:
    """Find MXFP4 weights as in GPT-OSS: E2M1 stacks `<name>_blocks`, and `<name>_scales`, exponents of 32 columns."""
    weights = {}
    for key, t in checkpoint.tensors.items():
        name = key.removesuffix("_blocks")
        if name == key:
            if key.endswith("_scales") and key.removesuffix("_scales") + "_blocks" not in checkpoint.tensors:
                raise ValueError(f"{key}: expected its weights in {key.removesuffix('_scales')}_blocks, got none")
            continue
        if t.dtype != "uint8" or len(t.shape) != 4 or t.shape[3] != 16 or not t.elements:
            raise ValueError(
                f"{key}: expected uint8 of shape (matrices, rows, blocks, 16), got {t.dtype} of shape {t.shape}"
            )
        matrices, rows, blocks, half = t.shape
        shape = rows, blocks * 2 * half
        weights[name] = ScaledWeight(
            key, name + "_scales", None, shape, (1, 2 * half), 4, is_fp4=True, matrices=matrices, dtype=torch.bfloat16
        )
        check_scales(checkpoint, weights[name], "uint8")
    return weights, set(), "MXFP4"


_FORMATS: dict[str, Callable[[Checkpoint, Mapping[str, Any]], Found]] = {
    "fp8": _fp8, "compressed-tensors": compressed_tensors.read, "mxfp4": _mxfp4,
}  # fmt: skip
