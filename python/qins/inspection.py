"""What a saved model holds: codecs, dtypes, bytes by kind, and (against another one) the error of every layer."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .array import ARRAYS, EXPERT_STACKS, FIELD_ROLES, SCALARS, EncodedArray, split_field
from .coded import default_group_size, slow_group_size
from .conversion import snr_db
from .files import Checkpoint, StoredTensor, open_checkpoint, verify
from .linear import QINSLinear

# What the bytes of a field are counted as: the seed calls codes "stored".
_KINDS = {name: "stored" if role == "codes" else role for name, role in FIELD_ROLES.items()}


_HISTOGRAM_CODES = 1 << 20


@dataclass(frozen=True)
class EncodedLayer:
    """The codes of one layer in a file.

    Attributes:
        name: of the layer; its fields are `<name>.<field>`.
        codec: "log8", "log9", "golden" or "rational".
        shape: of the weight.
        group_size: inputs that share a scale, or None.
        fields: field name to key in the file.
        bytes: of all fields.

    """

    name: str
    codec: str
    shape: tuple[int, ...]
    group_size: int | None
    fields: dict[str, str]
    bytes: int

    @property
    def is_stack(self) -> bool:
        """Whether it is the experts of a mixture, one matrix each."""
        return self.name.rpartition(".")[2] in EXPERT_STACKS and len(self.shape) == 3


@dataclass(frozen=True)
class LayerError:
    """How a layer differs from the same one elsewhere: its values minus theirs."""

    name: str
    snr_db: float
    max_error: float
    relative_rms: float


@dataclass
class InspectionReport:
    """What is in a checkpoint; printing it gives tables.

    Attributes:
        path, format, files: the checkpoint.
        layers: those held as codes.
        bytes_by_kind: "stored" (codes), "sign", "range" (scales and ranges) and "other" tensors.
        bytes_by_dtype: of all tensors.
        tensor_bytes: of all tensors, shared ones once.
        float32_bytes: of the same model with all its weights in float32.
        problems: sentences on what is wrong.
        notes: sentences on what could be better.
        errors: of each layer, against another checkpoint.
        verified: how many tensors have the checksum that the checkpoint says.
        histograms: of each layer, if asked for: at most a million weights by magnitude, in 32 equal ranges of its codes
            from zero up.

    """

    path: str
    format: str
    files: dict[str, int]
    tensors: int
    layers: list[EncodedLayer] = field(default_factory=list)
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    bytes_by_dtype: dict[str, int] = field(default_factory=dict)
    tensor_bytes: int = 0
    float32_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[LayerError] = field(default_factory=list)
    verified: int = 0
    histograms: dict[str, list[int]] = field(default_factory=dict)

    @property
    def file_bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    @property
    def overhead_bytes(self) -> int:
        """What the files take beyond their tensors: headers, padding, pickles."""
        return self.file_bytes - self.tensor_bytes

    @property
    def compression_in_memory(self) -> float:
        """float32_bytes over the tensors' bytes."""
        return self.float32_bytes / self.tensor_bytes if self.tensor_bytes else 1.0

    @property
    def compression_on_disk(self) -> float:
        """float32_bytes over the files' bytes."""
        return self.float32_bytes / self.file_bytes if self.file_bytes else 1.0

    @property
    def compression_of_layers(self) -> float:
        """float32 bytes of the encoded layers' weights over the bytes of their codes."""
        codes = sum(layer.bytes for layer in self.layers)
        return 4 * sum(math.prod(layer.shape) for layer in self.layers) / codes if codes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": self.path,
            "format": self.format,
            "files": self.files,
            "file_bytes": self.file_bytes,
            "tensors": self.tensors,
            "tensor_bytes": self.tensor_bytes,
            "overhead_bytes": self.overhead_bytes,
            "float32_bytes": self.float32_bytes,
            "compression_in_memory": self.compression_in_memory,
            "compression_on_disk": self.compression_on_disk,
            "compression_of_layers": self.compression_of_layers,
            "bytes_by_kind": self.bytes_by_kind,
            "bytes_by_dtype": self.bytes_by_dtype,
            "layers": [vars(layer) | {"shape": list(layer.shape)} for layer in self.layers],
            "errors": [vars(e) for e in self.errors],
            "verified": self.verified,
            "histograms": self.histograms,
            "problems": self.problems,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        errors = {e.name: e for e in self.errors}
        levels = "codes, from zero up" if self.histograms else ""
        rows = [("layer", "codec", "shape", "bytes", "SNR dB", "max error", levels)]
        for layer in self.layers:
            codec = f"{layer.codec}/{layer.group_size}" if layer.group_size else layer.codec
            e = errors.pop(layer.name, None)
            snr, worst = (f"{e.snr_db:.2f}", f"{e.max_error:.2e}") if e else ("", "")
            shape = "x".join(map(str, layer.shape))
            bars = _bars(self.histograms.get(layer.name, []))
            rows.append((layer.name, codec, shape, f"{layer.bytes:,}", snr, worst, bars))
        for e in errors.values():
            rows.append((e.name, "float", "", "", f"{e.snr_db:.2f}", f"{e.max_error:.2e}", ""))
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = [f"{self.path}: {self.format}, {len(self.files)} files, {self.tensors} tensors"]
        if len(rows) > 1:
            left = (0, 1, 2, 6)
            for r in rows:
                cells = (
                    c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
                )
                lines.append("  ".join(cells))
            lines.insert(2, "  ".join("-" * w for w in widths))
        lines.append("by kind    " + ", ".join(f"{k} {v:,}" for k, v in self.bytes_by_kind.items()))
        lines.append("by dtype   " + ", ".join(f"{k} {v:,}" for k, v in self.bytes_by_dtype.items()))
        lines.append(
            f"in memory  {self.tensor_bytes:,} bytes, {self.compression_in_memory:.2f} times less than float32"
        )
        overhead = f"{self.overhead_bytes:,} of them not tensors"
        lines.append(f"on disk    {self.file_bytes:,} bytes, {self.compression_on_disk:.2f} times less; {overhead}")
        if self.layers:
            lines.append(
                f"encoded    {len(self.layers)} layers, {self.compression_of_layers:.2f} times less than float32"
            )
        if self.verified:
            lines.append(f"checksums  of {self.verified} tensors are right")
        lines += [f"note       {n}" for n in self.notes]
        lines += [f"PROBLEM: {p}" for p in self.problems]
        return "\n".join(line.rstrip() for line in lines)


def _bars(counts: list[int]) -> str:
    """A histogram as a line of bars."""
    most = max(counts, default=0)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * n // most)] for n in counts) if most else ""


def _histogram(checkpoint: Checkpoint, layer: EncodedLayer) -> list[int]:
    codes = checkpoint.load(layer.fields[ARRAYS[layer.codec][0]]).numpy().reshape(-1)
    step = -(-codes.size // _HISTOGRAM_CODES) | 1  # odd, so that it goes through all columns
    # one bit of sign and seven of magnitude, or eight of magnitude, of which 255 is the smallest
    signed = layer.codec in ("log8", "rational")
    levels = codes[::step] & 0x7F if signed else (255 - codes[::step]) >> 1
    counts: list[int] = np.bincount(levels >> 2, minlength=32).tolist()
    return counts


def _group_size(cols: int, groups: int, config: Mapping[str, Any]) -> int:
    """The group size that gives so many groups: the config's, else the default one, else a power of two."""
    told = config.get("quantization_config", {})
    told = told.get("group_size") if isinstance(told, dict) else None
    candidates = [told] if isinstance(told, int) and told > 0 else []
    candidates += [default_group_size(cols), *(1 << i for i in range(20)), -(-cols // max(groups, 1))]
    return next((g for g in candidates if -(-cols // g) == groups), 0)


def encoded_layers(checkpoint: Checkpoint, problems: list[str]) -> list[EncodedLayer]:
    """Find the layers that are held as codes; what is incomplete or does not fit goes to `problems`."""
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
            codes = next((k for k in parts if _KINDS[k] == "stored"), None)
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
            f"{codes.name}: expected uint8 codes, got {codes.dtype}, {size:g} bytes a weight: not quantised"
        )
        return None
    wanted = {*ARRAYS[codec], *SCALARS[codec]}
    group = None
    if codec == "log8" and "group_scale" in parts:
        wanted.add("group_scale")
        shape = parts["group_scale"].shape
        group = _group_size(codes.shape[-1] if codes.shape else 1, shape[-1] if shape else 0, checkpoint.config)
        if group == 0:
            problems.append(f"{name}: group_scale of shape {shape} fits no group size for codes of {codes.shape}")
            return None
    missing = sorted(wanted - set(parts))
    if missing:
        problems.append(f"{name}: {codec} without {', '.join(missing)}")
        return None
    fields = {n: parts[n].name for n in parts if n in wanted}
    return EncodedLayer(name, codec, codes.shape, group, fields, sum(parts[n].bytes for n in fields))


def load_layer(checkpoint: Checkpoint, layer: EncodedLayer) -> list[EncodedArray]:
    """Load the codes of a layer, every field checked: one matrix, or those of its experts.

    Raises:
        ValueError, TypeError: a field is not what its codec has; the message names the file and the layer.

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


def inspect(path: str | Path, against: str | Path | None = None, *, histograms: bool = False) -> InspectionReport:
    """Say what a saved model holds.

    Args:
        path: a safetensors, torch or GGUF file, or a directory with one model.
        against: another checkpoint; each layer of both is then compared, codes or floats on either side.
        histograms: count how often each level is used.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, hostile, or `against` has no layer in common.

    """
    checkpoint = open_checkpoint(path)
    problems: list[str] = []
    layers = encoded_layers(checkpoint, problems)
    of_layers = {key: n for layer in layers for n, key in layer.fields.items()}
    report = InspectionReport(
        str(path), checkpoint.format, {p.name: n for p, n in checkpoint.files.items()}, len(checkpoint.tensors), layers,
        problems=problems,
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
        kind = _KINDS[of_layers[key]] if key in of_layers else "other"
        kinds[kind] += t.bytes
        dtypes[t.dtype] += t.bytes
        report.float32_bytes += 4 * t.elements if kind in ("stored", "other") else 0
    report.bytes_by_kind, report.bytes_by_dtype = kinds, dict(dtypes)
    report.tensor_bytes = sum(kinds.values())
    if checkpoint.format != "gguf":
        for layer in layers:
            _check_layer(checkpoint, layer, problems)
            if histograms:
                report.histograms[layer.name] = _histogram(checkpoint, layer)
        report.verified = _verify(checkpoint, problems)
    if against is not None:
        report.errors = _compare(checkpoint, layers, open_checkpoint(against))
    return report


def _check_layer(checkpoint: Checkpoint, layer: EncodedLayer, problems: list[str]) -> None:
    try:
        load_layer(checkpoint, layer)
    except (ValueError, TypeError) as e:
        problems.append(str(e))


def _verify(checkpoint: Checkpoint, problems: list[str]) -> int:
    """Compare tensors with the checksums that the checkpoint has; return how many are right."""
    quantization = checkpoint.config.get("quantization_config")
    known = quantization.get("checksums") if isinstance(quantization, dict) else None
    right, wrong = verify(checkpoint, known) if isinstance(known, dict) else (0, [])
    problems += wrong
    return right


class _Weights:
    """The weights of a checkpoint by layer, whether codes or floats."""

    def __init__(self, checkpoint: Checkpoint, layers: list[EncodedLayer]) -> None:
        self.checkpoint = checkpoint
        self.layers = {layer.name: layer for layer in layers}
        floats = {"float32", "float16", "bfloat16", "float64"}
        self.floats = {
            k.removesuffix(".weight")
            for k, t in checkpoint.tensors.items()
            if k.endswith(".weight") and t.dtype in floats and len(t.shape) >= 2
        }

    def names(self) -> list[str]:
        return [*self.layers, *sorted(self.floats - set(self.layers))]

    def load(self, name: str) -> np.ndarray[Any, Any]:
        if name in self.layers:
            layer = self.layers[name]
            decoded = [e.decode() for e in load_layer(self.checkpoint, layer)]
            return np.stack(decoded) if layer.is_stack else decoded[0]
        return self.checkpoint.load(f"{name}.weight").float().numpy()


def _compare(checkpoint: Checkpoint, layers: list[EncodedLayer], other: Checkpoint) -> list[LayerError]:
    mine, theirs = _Weights(checkpoint, layers), _Weights(other, encoded_layers(other, []))
    common = [n for n in mine.names() if n in {*theirs.names()}]
    if not common:
        raise ValueError(f"{other.path}: expected layers of {checkpoint.path}, got none of the same name")
    errors = []
    for name in common:
        a, b = mine.load(name), theirs.load(name)
        if a.shape != b.shape:
            raise ValueError(f"{other.path}: {name}: expected shape {a.shape} as in {checkpoint.path}, got {b.shape}")
        signal = float(np.vdot(b.astype(np.float64), b))
        difference = a - b
        noise = float(np.vdot(difference.astype(np.float64), difference))
        snr = snr_db(signal, noise)
        worst = float(np.abs(difference).max(initial=0.0))
        errors.append(LayerError(name, snr, worst, math.sqrt(noise / signal) if signal > 0 else math.inf))
    return errors


def load_seed_checkpoint(model: nn.Module, file: str | Path) -> list[str]:
    """Put a model that the seed's code saved into `model`, whose architecture it has.

    The file holds `<layer>.stored`, `.sign`, `.log_min` and `.log_max` for encoded layers beside ordinary tensors. Each
    encoded nn.Linear of the model becomes a QINSLinear with these codes; everything else is copied.

    Returns:
        the names of the encoded layers.

    Raises:
        FileNotFoundError, ValueError: the file is damaged or does not fit the model; the model is then unchanged.

    """
    checkpoint = open_checkpoint(file)
    problems: list[str] = []
    layers = encoded_layers(checkpoint, problems)
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    if not any(layer.codec == "golden" for layer in layers):
        raise ValueError(f"{file}: expected layers of stored, sign, log_min and log_max, got none")
    modules = dict(model.named_modules())
    new: dict[str, QINSLinear] = {}
    for layer in layers:
        module = modules.get(layer.name)
        if not isinstance(module, nn.Linear):
            what = "no such module" if module is None else type(module).__name__
            raise ValueError(f"{file}: {layer.name}: expected an nn.Linear of the model, got {what}")
        if layer.shape != (module.out_features, module.in_features):
            want = (module.out_features, module.in_features)
            raise ValueError(f"{file}: {layer.name}: expected codes of shape {want}, got {layer.shape}")
        (encoded,) = load_layer(checkpoint, layer)
        kept = {n: np.array(f) for n, f in encoded.fields.items()}
        encoded = EncodedArray(layer.codec, layer.shape, kept, layer.group_size)
        new[layer.name] = QINSLinear.from_encoded(module, encoded, layer.codec, layer.group_size)
    coded = {key for layer in layers for key in layer.fields.values()}
    guards = {f"{name}.weight" for name in new}  # empty, see _hf_names.guard
    rest = {
        key: checkpoint.load(key) for key, t in checkpoint.tensors.items()
        if key not in coded and (t.elements or key not in guards)
    }  # fmt: skip
    _check_rest(model, rest, new, file)
    for name, module in new.items():
        parent, _, key = name.rpartition(".")
        modules[parent]._modules[key] = module
    model.load_state_dict(rest, strict=False)
    return list(new)


def _check_rest(model: nn.Module, rest: dict[str, torch.Tensor], new: dict[str, QINSLinear], file: str | Path) -> None:
    """Raise unless the float tensors of the file are those that the model still needs."""
    own = model.state_dict()
    coded = {f"{name}.{n}" for name in new for n in ("weight", *ARRAYS["golden"], *SCALARS["golden"])}
    present = {t.data_ptr() for k, t in own.items() if k in rest}
    missing = [k for k, t in own.items() if k not in rest and k not in coded and t.data_ptr() not in present]
    unexpected = [k for k in rest if k not in own]
    wrong = [
        f"{k}: shape {tuple(rest[k].shape)} for {tuple(own[k].shape)}"
        for k in rest
        if k in own and rest[k].shape != own[k].shape
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("mismatched", wrong)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{file}: does not fit the model: {what} {', '.join(names[:5])}{more}")
