"""Inspection of a saved model: codecs, dtypes, bytes by kind, and the error of every layer against another model."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..codec import ARRAYS, is_packed, slow_group_size, snr_db, unpack, weights_of
from .exact import exact_bytes
from .inspection_report import InspectionReport, LayerError
from .layers import KINDS, EncodedLayer, encoded_layers, is_stack, load_layer
from .reading import Checkpoint, open_checkpoint, verify
from .restoring import exact_problems
from .source_formats import open_scaled

_HISTOGRAM_CODES = 1 << 20


def _histogram(checkpoint: Checkpoint, layer: EncodedLayer) -> list[int]:
    codes = checkpoint.load(layer.fields[ARRAYS[layer.codec][0]]).numpy()
    if is_packed(layer.codec):
        rows = codes.reshape(-1, codes.shape[-1])[:: -(-codes.size // _HISTOGRAM_CODES)]
        levels = unpack(rows.astype(np.int32), layer.codec, np.concatenate)[1].reshape(-1)
    else:
        step = -(-codes.size // _HISTOGRAM_CODES) | 1  # odd, so that the samples come from all columns
        sampled = codes.reshape(-1)[::step]
        # a sign bit and seven bits of magnitude, or eight bits of magnitude, where 255 is the smallest
        levels = sampled & 0x7F if layer.codec in ("log8", "rational") else (255 - sampled) >> 1
    counts: list[int] = np.bincount(levels >> 2, minlength=32).tolist()
    return counts


def inspect(path: str | Path, against: str | Path | None = None, *, histograms: bool = False) -> InspectionReport:
    """Report the contents of a saved model.

    Args:
        path: a safetensors, torch or GGUF file, or a directory with one model.
        against: another checkpoint; layers in both, as codes or floats on either side, are compared.
        histograms: count the use of the codec's levels in each layer.

    Returns:
        a report that prints as tables.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or hostile, or `against` has no layer in common.

    """
    checkpoint = open_checkpoint(path)
    problems: list[str] = []
    layers = encoded_layers(checkpoint, problems)
    of_layers = {key: n for layer in layers for n, key in layer.fields.items()}
    report = InspectionReport(
        str(path), checkpoint.format, {p.name: n for p, n in checkpoint.files.items()}, len(checkpoint.tensors), layers,
        problems=problems, exact_bytes=exact_bytes(checkpoint.path),
    )  # fmt: skip
    slow = Counter(slow_group_size(layer.codec, layer.group_size) for layer in layers)
    report.notes = [f"{n} layer{'s' if n > 1 else ''} with {told}" for told, n in sorted(slow.items()) if told]
    kinds: dict[str, int] = dict.fromkeys(("stored", "sign", "range", "other"), 0)
    dtypes: dict[str, int] = defaultdict(int)
    seen: set[tuple[str, int]] = set()
    for key, t in checkpoint.tensors.items():
        if t.storage in seen and t.bytes:
            continue
        seen.add(t.storage)
        kind = KINDS[of_layers[key]] if key in of_layers else "other"
        kinds[kind] += t.bytes
        dtypes[t.dtype] += t.bytes
        weights = weights_of(of_layers[key], t.elements) if kind == "stored" else t.elements
        report.float32_bytes += 4 * weights if kind in ("stored", "other") else 0
    report.bytes_by_kind, report.bytes_by_dtype = kinds, dict(dtypes)
    report.tensor_bytes = sum(kinds.values())
    if checkpoint.format != "gguf":
        for layer in layers:
            _check_layer(checkpoint, layer, problems)
            if histograms:
                report.histograms[layer.name] = _histogram(checkpoint, layer)
        report.verified = _verify(checkpoint, problems)
        problems += exact_problems(checkpoint)
    if against is not None:
        report.errors = _compare(checkpoint, layers, open_scaled(open_checkpoint(against)))
    return report


def _check_layer(checkpoint: Checkpoint, layer: EncodedLayer, problems: list[str]) -> None:
    try:
        load_layer(checkpoint, layer)
    except (ValueError, TypeError) as e:
        problems.append(str(e))


def _verify(checkpoint: Checkpoint, problems: list[str]) -> int:
    """Compare tensors with the checkpoint's checksums; return how many match."""
    quantization = checkpoint.config.get("quantization_config")
    known = quantization.get("checksums") if isinstance(quantization, dict) else None
    right, wrong = verify(checkpoint, known) if isinstance(known, dict) else (0, [])
    problems += wrong
    return right


class _Weights:
    """The weights of a checkpoint by layer, as codes or floats."""

    def __init__(self, checkpoint: Checkpoint, layers: list[EncodedLayer]) -> None:
        self.checkpoint = checkpoint
        self.layers = {layer.name: layer for layer in layers}
        floats = {"float32", "float16", "bfloat16", "float64"}
        self.floats = {
            k.removesuffix(".weight"): k
            for k, t in checkpoint.tensors.items()
            if t.dtype in floats
            and ((k.endswith(".weight") and len(t.shape) >= 2) or (is_stack(k) and len(t.shape) == 3))
        }

    def names(self) -> list[str]:
        return [*self.layers, *sorted(set(self.floats) - set(self.layers))]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layers[name].shape if name in self.layers else self.checkpoint.tensors[self.floats[name]].shape

    def matrices(self, name: str) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the float weight, or the matrices of a stack one by one."""
        if name in self.layers:
            yield from (e.decode() for e in load_layer(self.checkpoint, self.layers[name]))
        elif len(self.shape(name)) == 3 and is_stack(name):
            yield from (m.float().numpy() for m in self.checkpoint.load_matrices(self.floats[name]))
        else:
            yield self.checkpoint.load(self.floats[name]).float().numpy()


def _compare(checkpoint: Checkpoint, layers: list[EncodedLayer], other: Checkpoint) -> list[LayerError]:
    mine, theirs = _Weights(checkpoint, layers), _Weights(other, encoded_layers(other, []))
    common = [n for n in mine.names() if n in {*theirs.names()}]
    if not common:
        raise ValueError(f"{other.path}: expected layers of {checkpoint.path}, got none of the same name")
    shapes = {n: (mine.shape(n), theirs.shape(n)) for n in common}
    # codes are (out_features, in_features); the floats of transformers' Conv1D, as in GPT-2, and of some experts are
    # transposed
    turned = any(a != b and _turned(a) == b for a, b in shapes.values())
    errors = []
    for name, (shape, other_shape) in shapes.items():
        one_is_codes = (name in mine.layers) != (name in theirs.layers)
        may_turn = turned and one_is_codes and _turned(shape) == other_shape
        if shape != other_shape and not may_turn:
            raise ValueError(f"{other.path}: {name}: expected shape {shape} as in {checkpoint.path}, got {other_shape}")
        signal = noise = worst = 0.0
        for a, b in zip(mine.matrices(name), theirs.matrices(name), strict=True):
            if may_turn and (a.shape[0] != a.shape[1] or np.linalg.norm(a - b.T) < np.linalg.norm(a - b)):
                b = b.T
            difference = a - b
            signal += float(np.square(b, dtype=np.float64).sum())
            noise += float(np.square(difference, dtype=np.float64).sum())
            worst = max(worst, float(np.abs(difference).max(initial=0.0)))
        relative = math.sqrt(noise / signal) if signal > 0 else math.inf
        errors.append(LayerError(name, snr_db(signal, noise), worst, relative))
    return errors


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *shape[:-3:-1]) if len(shape) in (2, 3) else ()
