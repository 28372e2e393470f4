"""The encoded layers of a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..codec import (
    ARRAYS,
    EXPERT_STACKS,
    FIELD_ROLES,
    LOG_BITS,
    SCALARS,
    EncodedArray,
    code_columns,
    is_packed,
    resolve_group_size,
    split_field,
)
from .reading import Checkpoint, StoredTensor

# The kind that a field's bytes count as. As in the seed, codes are "stored".
KINDS = {name: "stored" if role == "codes" else role for name, role in FIELD_ROLES.items()}


@dataclass(frozen=True)
class EncodedLayer:
    """The codes of one layer in a file.

    Attributes:
        name: name of the layer; its fields are `<name>.<field>`.
        codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".
        shape: shape of the weight.
        group_size: inputs per group scale, or None.
        fields: field name to key in the file.
        bytes: bytes of all fields.

    """

    name: str
    codec: str
    shape: tuple[int, ...]
    group_size: int | None
    fields: dict[str, str]
    bytes: int

    @property
    def is_stack(self) -> bool:
        """Whether this is a stack of experts, one matrix each."""
        return is_stack(self.name) and len(self.shape) == 3


def is_stack(name: str) -> bool:
    """Return whether this is the name of a stack of experts; a stack also has three dimensions."""
    return name.rpartition(".")[2] in EXPERT_STACKS


# Earlier versions': the first that divides a row, else the first
_EARLIER_DEFAULTS = (128, 192, 256)


def _group_size(name: str, codec: str, cols: int, groups: int, config: Mapping[str, Any]) -> int:
    """Return a group size that gives this number of groups: the config's, else a default, else a power of two."""
    about = config.get("quantization_config")
    about = about if isinstance(about, dict) else {}
    modules = about.get("modules")
    of_layer = modules.get(name) if isinstance(modules, dict) else None
    told = [of_layer[1] if isinstance(of_layer, list) and len(of_layer) > 1 else None, about.get("group_size")]
    candidates = [t for t in told if isinstance(t, int) and t > 0]
    candidates += [
        resolve_group_size(codec, "default", cols) or 0,
        next((g for g in _EARLIER_DEFAULTS if cols % g == 0), _EARLIER_DEFAULTS[0]),
    ]
    candidates += [*(1 << i for i in range(20)), -(-cols // max(groups, 1))]
    return next((g for g in candidates if g > 0 and -(-cols // g) == groups), 0)


def encoded_layers(checkpoint: Checkpoint, problems: list[str]) -> list[EncodedLayer]:
    """Return the encoded layers; report incomplete or inconsistent ones in `problems`."""
    by_layer: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for key, tensor in checkpoint.tensors.items():
        prefix, _, last = key.rpartition(".")
        found = split_field(last)
        if found is not None:
            stack, name = found
            by_layer[f"{prefix}.{stack}" if stack else prefix][name] = tensor
    layers = []
    for name, parts in by_layer.items():
        codec = next((c for c, names in ARRAYS.items() if set(names) <= set(parts)), None)
        if codec is None:
            codes = next((k for k in parts if KINDS[k] == "stored"), None)
            if codes is not None:
                known = " or ".join(" and ".join(v) for v in ARRAYS.values() if v[0] == codes)
                problems.append(f"{name}: expected {known} together, got {', '.join(parts)}")
            continue
        layer = _layer(name, codec, parts, checkpoint, problems)
        if layer is not None:
            layers.append(layer)
    return layers


def _layer(
    name: str, codec: str, parts: dict[str, StoredTensor], checkpoint: Checkpoint, problems: list[str]
) -> EncodedLayer | None:
    codes = parts[ARRAYS[codec][0]]
    if codes.dtype != "uint8":
        size = codes.bytes / max(codes.elements, 1)
        problems.append(
            f"{codes.name}: expected uint8 codes, got {codes.dtype}, {size:g} bytes per weight: not quantized"
        )
        return None
    wanted = {*ARRAYS[codec], *SCALARS[codec]}
    try:
        cols = code_columns(codec, codes.shape[-1] if codes.shape else 1)
    except ValueError as e:
        problems.append(f"{name}: {e}")
        return None
    group = None
    if codec in LOG_BITS and ("group_scale" in parts or is_packed(codec)):
        wanted.add("group_scale")
        shape = parts["group_scale"].shape if "group_scale" in parts else ()
        group = _group_size(name, codec, cols, shape[-1] if shape else 0, checkpoint.config)
        if group == 0 and "group_scale" in parts:
            problems.append(f"{name}: group_scale of shape {shape} fits no group size for codes of {codes.shape}")
            return None
    missing = sorted(wanted - set(parts))
    if missing:
        problems.append(f"{name}: {codec} without {', '.join(missing)}")
        return None
    fields = {n: parts[n].name for n in parts if n in wanted}
    shape = (*codes.shape[:-1], cols) if codes.shape else ()
    return EncodedLayer(name, codec, shape, group, fields, sum(parts[n].bytes for n in fields))


def load_layer(checkpoint: Checkpoint, layer: EncodedLayer) -> list[EncodedArray]:
    """Load the codes of a layer and check every field: one matrix, or one per expert.

    Raises:
        ValueError, TypeError: a field does not fit its codec; the message names the file and the layer.

    """
    tensors = {n: checkpoint.load(key) for n, key in layer.fields.items()}
    experts = layer.shape[0] if layer.is_stack else 1
    for n in SCALARS[layer.codec]:
        if tensors[n].numel() != experts:
            told = "one number" if experts == 1 else f"{experts} numbers"
            raise ValueError(f"{checkpoint.path}: {layer.name}.{n}: expected {told}, got {tuple(tensors[n].shape)}")
        tensors[n] = tensors[n].reshape((experts,) if layer.is_stack else ()).float()
    fields = {n: t.detach().numpy() for n, t in tensors.items()}
    try:
        if not layer.is_stack:
            return [EncodedArray.from_fields(layer.codec, fields, layer.group_size)]
        short = [n for n, f in fields.items() if len(f) != experts]
        if short:
            raise ValueError(f"{short[0]}: expected {experts} experts, got {len(fields[short[0]])}")
        return [
            EncodedArray.from_fields(layer.codec, {n: np.asarray(f[i]) for n, f in fields.items()}, layer.group_size)
            for i in range(experts)
        ]
    except (ValueError, TypeError) as e:
        raise type(e)(f"{checkpoint.path}: {layer.name}: {e}") from None
