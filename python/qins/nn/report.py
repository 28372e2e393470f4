"""Reports of conversions."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConvertedModule:
    """One converted layer. Bytes count the weight only; the bias does not change."""

    name: str
    shape: tuple[int, ...]  # a stack of experts has their number first
    codec: str
    group_size: int | None
    bytes_before: int
    bytes_after: int
    snr_db: float  # 10 log10 of squared weights over squared errors; infinite if exact, nan on meta
    note: str = field(default="", kw_only=True)  # why its codec is not the one asked for


@dataclass(frozen=True)
class SkippedModule:
    """A module that holds a matrix and was not converted."""

    name: str
    kind: str
    reason: str


@dataclass
class ConversionReport:
    """The result of `convert`; prints as a table.

    Attributes:
        converted, skipped: modules.
        source_format: of the weights if they were in 8 or 4 bits.

    """

    converted: list[ConvertedModule] = field(default_factory=list)
    skipped: list[SkippedModule] = field(default_factory=list)
    source_format: str | None = None

    @property
    def bytes_before(self) -> int:
        """Bytes of the converted weights before conversion."""
        return sum(m.bytes_before for m in self.converted)

    @property
    def bytes_after(self) -> int:
        """Bytes of the codes."""
        return sum(m.bytes_after for m in self.converted)

    @property
    def compression(self) -> float:
        """Compression of the converted weights: bytes before over bytes after."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    def to_dict(self) -> dict[str, object]:
        """Return a dictionary for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "compression": self.compression,
            "converted": [vars(m) | {"shape": list(m.shape)} for m in self.converted],
            "skipped": [vars(m) for m in self.skipped],
            "source_format": self.source_format,
        }

    def __str__(self) -> str:
        rows = [("module", "shape", "codec", "bytes before", "bytes after", "SNR dB")]
        for m in self.converted:
            codec = f"{m.codec}/{m.group_size}" if m.group_size else m.codec
            rows.append(
                (m.name, "x".join(map(str, m.shape)), codec, f"{m.bytes_before:,}", f"{m.bytes_after:,}",
                 f"{m.snr_db:.2f}")
            )  # fmt: skip
        rows.append(
            ("total", f"{len(self.converted)} modules", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}",
             f"{self.compression:.2f}x")
        )  # fmt: skip
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.insert(-1, lines[1])
        if self.source_format:
            lines.append(f"from weights in {self.source_format}")
        lines += [f"{m.name}: {m.note}" for m in self.converted if m.note]
        if self.skipped:
            lines.append("left as they were:")
            lines += [f"  {s.name} ({s.kind}): {s.reason}" for s in self.skipped]
        return "\n".join(line.rstrip() for line in lines)
