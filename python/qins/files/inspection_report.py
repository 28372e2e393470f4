"""The report of `inspect`, as tables and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from .layers import EncodedLayer


@dataclass(frozen=True)
class LayerError:
    """The error of a layer: its weights minus those of the same layer in another checkpoint."""

    name: str
    snr_db: float
    max_error: float
    relative_rms: float


@dataclass
class InspectionReport:
    """The contents of a checkpoint; prints as tables.

    Attributes:
        path, format, files: of the checkpoint; files are names to sizes in bytes.
        tensors: number of tensors.
        layers: the encoded layers.
        bytes_by_kind: "stored" (codes), "sign", "range" (scales and ranges) and "other" tensors.
        bytes_by_dtype: bytes of all tensors by dtype.
        tensor_bytes: bytes of all tensors, shared ones counted once.
        float32_bytes: bytes of the same model with all weights in float32.
        problems: sentences on what is wrong.
        notes: sentences on what could be better.
        errors: error of each layer against another checkpoint.
        verified: number of tensors that match their checksums.
        histograms: of each layer, on request: at most a million weights by magnitude, in 32 equal ranges of the codes,
            from zero up.
        exact_bytes: bytes of the files beside it that restore its original; 0 if it has none.

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
    exact_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    @property
    def overhead_bytes(self) -> int:
        """Bytes of the files beyond their tensors: headers, padding, pickles."""
        return self.file_bytes - self.tensor_bytes

    @property
    def compression_in_memory(self) -> float:
        """Ratio of float32_bytes to the tensors' bytes."""
        return self.float32_bytes / self.tensor_bytes if self.tensor_bytes else 1.0

    @property
    def compression_on_disk(self) -> float:
        """Ratio of float32_bytes to the files' bytes."""
        return self.float32_bytes / self.file_bytes if self.file_bytes else 1.0

    @property
    def compression_of_layers(self) -> float:
        """Ratio of the encoded layers' bytes in float32 to the bytes of their codes."""
        codes = sum(layer.bytes for layer in self.layers)
        return 4 * sum(math.prod(layer.shape) for layer in self.layers) / codes if codes else 1.0

    @property
    def bits_per_weight(self) -> float:
        """Bits of the encoded layers per weight."""
        weights = sum(math.prod(layer.shape) for layer in self.layers)
        return 8 * sum(layer.bytes for layer in self.layers) / weights if weights else 0.0

    @property
    def restoring_bits_per_weight(self) -> float:
        """Bits per weight of the encoded layers that restoring their original needs besides."""
        weights = sum(math.prod(layer.shape) for layer in self.layers)
        return 8 * self.exact_bytes / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
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
            "bits_per_weight": self.bits_per_weight,
            "exact_bytes": self.exact_bytes,
            "restoring_bits_per_weight": self.restoring_bits_per_weight,
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
        """Return `to_dict` as JSON text."""
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
            f"in memory  {self.tensor_bytes:,} bytes, {self.compression_in_memory:.2f} times smaller than float32"
        )
        overhead = f"{self.overhead_bytes:,} of them outside tensors"
        lines.append(f"on disk    {self.file_bytes:,} bytes, {self.compression_on_disk:.2f} times smaller; {overhead}")
        if self.layers:
            lines.append(
                f"encoded    {len(self.layers)} layers, {self.compression_of_layers:.2f} times smaller than float32, "
                f"{self.bits_per_weight:.2f} bits per weight"
            )
        if self.exact_bytes:
            lines.append(
                f"restoring  the original: {self.exact_bytes:,} bytes more, {self.restoring_bits_per_weight:.2f} bits "
                f"per encoded weight, {self.bits_per_weight + self.restoring_bits_per_weight:.2f} in all"
            )
        if self.verified:
            lines.append(f"checksums  of {self.verified} tensors match")
        lines += [f"note       {n}" for n in self.notes]
        lines += [f"PROBLEM: {p}" for p in self.problems]
        return "\n".join(line.rstrip() for line in lines)


def _bars(counts: list[int]) -> str:
    """Return a histogram as a line of bars."""
    most = max(counts, default=0)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * n // most)] for n in counts) if most else ""
