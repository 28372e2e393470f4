"""Checkpoints released in 8 bits as sources of float weights, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .reading import Checkpoint, StoredTensor

_SCALE = "_scale_inv"


@dataclass
class ScaledCheckpoint(Checkpoint):
    """A checkpoint of FP8 weights, each of which is multiplied by its scales, in float32, when it is loaded.

    The format is that of DeepSeek and Qwen: `weight` in float8_e4m3fn, and `weight_scale_inv` with one factor for
    every block of it, those at the edges cut, or one for all of it.

    Attributes:
        source: whose tensors are decoded.
        block: rows and columns that share a scale; None for a scale of the whole tensor.

    """

    decodes = True

    source: Checkpoint = field(kw_only=True)
    block: tuple[int, int] | None = None

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor, in float32 if it was FP8.

        Raises:
            KeyError: there is none of this name.
            ValueError: a scale is not finite.

        """
        weight = self.source.load(name)
        if weight.dtype != torch.float8_e4m3fn:
            return weight
        scale = self.source.load(name + _SCALE).float()
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"{self.where(name)}: {name}{_SCALE}: expected finite scales, got NaN or infinity")
        floats = weight.float()
        if self.block is None:
            return floats.mul_(scale.reshape(()))
        rows, columns = self.block
        for i, scales in enumerate(scale):  # a row of blocks at a time, for the memory
            part = floats[i * rows : (i + 1) * rows]
            part.mul_(scales.repeat_interleave(columns)[: part.shape[1]])
        return floats


def open_scaled(checkpoint: Checkpoint) -> Checkpoint:
    """Take a checkpoint as floats: as it is, or, if it is FP8, decoded when loaded.

    Raises:
        ValueError: its format is not one that is decoded, or scales are missing or have another shape.

    """
    told: Any = checkpoint.config.get("quantization_config") or {}
    if not isinstance(told, dict):
        raise ValueError(f"{checkpoint.path}: quantization_config: expected an object, got {told!r}")
    method = told.get("quant_method")
    if not told or method == "qins":
        return checkpoint
    if method != "fp8":
        raise ValueError(f"{checkpoint.path}: expected float weights or quant_method 'fp8', got {method!r}")
    size = told.get("weight_block_size")
    block = None if size is None else (int(size[0]), int(size[1]))
    if block is not None and min(block) < 1:
        raise ValueError(f"{checkpoint.path}: weight_block_size: expected two positive numbers, got {size}")
    tensors: dict[str, StoredTensor] = {}
    for name, t in checkpoint.tensors.items():
        if name.endswith((_SCALE, ".activation_scale", ".input_scale")):
            continue
        tensors[name] = _decoded(checkpoint, t, block) if "float8" in t.dtype or "F8" in t.dtype else t
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    return ScaledCheckpoint(
        checkpoint.path, checkpoint.format, checkpoint.files, tensors, config, checkpoint.metadata, checkpoint._where,
        source=checkpoint, block=block,
    )  # fmt: skip


def _decoded(checkpoint: Checkpoint, t: StoredTensor, block: tuple[int, int] | None) -> StoredTensor:
    where = f"{checkpoint.path}: {t.name}"
    if "e4m3" not in t.dtype.lower():
        raise ValueError(f"{where}: expected float8_e4m3fn, got {t.dtype}")
    scale = checkpoint.tensors.get(t.name + _SCALE)
    if scale is None:
        raise ValueError(f"{where}: expected its scales in {t.name}{_SCALE}, got none")
    if scale.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{where}{_SCALE}: expected float32, bfloat16 or float16, got {scale.dtype}")
    if block is None:
        if scale.elements != 1:
            raise ValueError(f"{where}{_SCALE}: expected one scale, got shape {scale.shape}")
    elif len(t.shape) != 2:
        raise ValueError(f"{where}: expected a matrix, got shape {t.shape}")
    else:
        expected = tuple(-(-n // b) for n, b in zip(t.shape, block, strict=True))
        if scale.shape != expected:
            raise ValueError(f"{where}{_SCALE}: expected shape {expected}, got {scale.shape}")
    return replace(t, dtype="float32", bytes=t.bytes + scale.bytes)
