"""The memory of a model, measured from the tensors that it actually has."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..codec import FIELD_ROLES, split_field, weights_of


def _role(name: str) -> str:
    field = split_field(name)
    return FIELD_ROLES[field[1]] if field else "other"


@dataclass(frozen=True)
class TensorMemory:
    """One tensor of one module.

    Attributes:
        name: as in the state dict.
        module: class of the module that holds it.
        kind: "parameter", "buffer" or "attribute" (a tensor that the state dict does not contain).
        role: "codes", "sign", "range" (scales and ranges of codes) or "other".
        dtype: its dtype, without "torch.".
        shape: its shape.
        device: its device; "meta" takes no memory.
        bytes: of its elements.
        resident_bytes: of the storage that it keeps alive; 0 if an earlier tensor has the same storage.
        shares: the name of that earlier tensor.

    """

    name: str
    module: str
    kind: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    device: str
    bytes: int
    resident_bytes: int
    shares: str | None


@dataclass(frozen=True)
class MemoryReport:
    """Every tensor of a model; printing it gives a table.

    Attributes:
        tensors: in the order of the modules.
        problems: sentences about tensors that contradict their names, or that other counts would miss.
        float32_bytes: size of the same model with all weights in float32.

    """

    tensors: tuple[TensorMemory, ...]
    problems: tuple[str, ...]
    float32_bytes: int

    def _sum(self, **where: str) -> int:
        return sum(t.resident_bytes for t in self.tensors if all(getattr(t, k) == v for k, v in where.items()))

    @property
    def total_bytes(self) -> int:
        """Bytes of all storages, each counted once; the meta device takes none."""
        return self._sum()

    @property
    def parameter_bytes(self) -> int:
        """Bytes of parameters."""
        return self._sum(kind="parameter")

    @property
    def buffer_bytes(self) -> int:
        """Bytes of buffers, which include the codes of quantized layers."""
        return self._sum(kind="buffer")

    @property
    def attribute_bytes(self) -> int:
        """Bytes of tensors that are neither, such as a dequantized copy in a plain attribute."""
        return self._sum(kind="attribute")

    @property
    def meta_bytes(self) -> int:
        """Bytes that tensors on the meta device would take."""
        return sum(t.bytes for t in self.tensors if t.device == "meta")

    @property
    def compression(self) -> float:
        """float32_bytes over the tensors' bytes, including those on the meta device."""
        taken = self.total_bytes + self.meta_bytes
        return self.float32_bytes / taken if taken else 1.0

    def by(self, attribute: str) -> dict[str, int]:
        """Return resident bytes by an attribute of the tensors, such as "dtype", "role", "kind" or "module"."""
        found: dict[str, int] = defaultdict(int)
        for t in self.tensors:
            found[str(getattr(t, attribute))] += t.resident_bytes
        return dict(found)

    def by_layer(self) -> dict[str, int]:
        """Return resident bytes by the path of the module that holds them."""
        found: dict[str, int] = defaultdict(int)
        for t in self.tensors:
            found[t.name.rpartition(".")[0]] += t.resident_bytes
        return dict(found)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON: totals, then every tensor."""
        return {
            "total_bytes": self.total_bytes,
            "parameter_bytes": self.parameter_bytes,
            "buffer_bytes": self.buffer_bytes,
            "attribute_bytes": self.attribute_bytes,
            "meta_bytes": self.meta_bytes,
            "float32_bytes": self.float32_bytes,
            "compression": self.compression,
            "bytes_by_dtype": self.by("dtype"),
            "bytes_by_role": self.by("role"),
            "bytes_by_layer": self.by_layer(),
            "problems": list(self.problems),
            "tensors": [asdict(t) | {"shape": list(t.shape)} for t in self.tensors],
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [("tensor", "module", "kind", "dtype", "shape", "bytes", "resident")]
        for t in self.tensors:
            kind = t.kind if t.role == "other" else f"{t.kind}, {t.role}"
            shape = "x".join(map(str, t.shape)) or "scalar"
            resident = "meta" if t.device == "meta" else f"as {t.shares}" if t.shares else f"{t.resident_bytes:,}"
            rows.append((t.name, t.module, kind, t.dtype, shape, f"{t.bytes:,}", resident))
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i < 5 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(lines[1])
        lines.append(
            f"parameters {self.parameter_bytes:,}, buffers {self.buffer_bytes:,}, others {self.attribute_bytes:,}"
        )
        lines.append("by dtype   " + ", ".join(f"{k} {v:,}" for k, v in self.by("dtype").items()))
        if self.meta_bytes:
            lines.append(f"not there  {self.meta_bytes:,} bytes on the meta device")
        in_float32 = f"{self.float32_bytes:,} in float32, {self.compression:.2f} times as many"
        lines.append(f"total      {self.total_bytes:,} bytes; {in_float32}")
        lines += [f"PROBLEM: {p}" for p in self.problems]
        return "\n".join(line.rstrip() for line in lines)


def _tensors_in(value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield "", value
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from ((f"[{i}]{rest}", t) for rest, t in _tensors_in(v))
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from ((f"[{k!r}]{rest}", t) for rest, t in _tensors_in(v))


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name, p in module._parameters.items():
        if p is not None:
            yield name, "parameter", p
    for name, b in module._buffers.items():
        if b is not None:
            yield name, "buffer", b
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield from ((name + rest, "attribute", t) for rest, t in _tensors_in(value))


def _storage_key(t: torch.Tensor) -> tuple[str, int]:
    return str(t.device), t.untyped_storage().data_ptr() if t.device.type != "meta" else id(t)


def _weights_of_codes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(_weights(name, t) for name, t in tensors.items() if _role(name) == "codes")


def _weights(name: str, tensor: torch.Tensor) -> int:
    """Return the number of weights in a tensor; packed codes have more of them than elements."""
    field = split_field(name)
    return weights_of(field[1], tensor.numel()) if field else tensor.numel()


def memory_report(model: nn.Module) -> MemoryReport:
    """Measure a model's memory: parameters, buffers, and tensors in plain attributes, where copies hide.

    A storage that several tensors share counts once, for the first of them. A view counts the whole storage that it
    keeps alive. Nothing is computed, dequantized or copied.

    Args:
        model: the model.

    Returns:
        a report that prints as a table.

    Raises:
        TypeError: `model` is not an nn.Module.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    found: list[TensorMemory] = []
    problems: list[str] = []
    owners: dict[tuple[str, int], str] = {}
    float32 = 0
    for path, module in model.named_modules():
        tensors = list(_tensors_of(module))
        registered = {name: t for name, kind, t in tensors if kind != "attribute"}
        weights = _weights_of_codes(registered)
        for name, kind, t in tensors:
            full = f"{path}.{name}" if path else name
            first = name.split(".")[0]
            role = _role(first) if weights or _role(first) == "codes" else "other"
            size = t.numel() * t.element_size()
            key, resident, shares = _storage_key(t), 0, None
            if t.device.type != "meta" and size:
                shares = owners.get(key)
                if shares is None:
                    owners[key] = full
                    resident = t.untyped_storage().nbytes()
            dtype = str(t.dtype).removeprefix("torch.")
            found.append(
                TensorMemory(full, type(module).__name__, kind, role, dtype, tuple(t.shape), str(t.device), size,
                             resident, shares)
            )  # fmt: skip
            if shares is None and kind != "attribute" and role in ("codes", "other"):
                float32 += 4 * (_weights(name, t) if role == "codes" else t.numel())
            problems += _problems(full, name, kind, role, t, weights, resident, size)
    return MemoryReport(tuple(found), tuple(problems), float32)


def _problems(
    full: str, name: str, kind: str, role: str, t: torch.Tensor, weights: int, resident: int, size: int
) -> Iterator[str]:
    if role == "codes" and t.element_size() != 1:
        dtype = str(t.dtype).removeprefix("torch.")
        yield f"{full}: codes take one byte per weight, these are {dtype}, {t.element_size()} bytes each: not quantized"
    if role == "sign" and t.element_size() != 1:
        yield f"{full}: signs take a byte or a bit per weight, these are {t.dtype}"
    if kind == "attribute" and t.device.type != "meta" and resident > 1 << 12:
        what = "a dequantized copy beside the codes" if weights and t.numel() >= weights else "a tensor"
        yield f"{full}: {what} of {resident:,} bytes in a plain attribute, which no state dict shows"
    if resident > 2 * size and resident > 1 << 20:
        yield f"{full}: a view of {size:,} bytes keeps a storage of {resident:,} bytes alive"
