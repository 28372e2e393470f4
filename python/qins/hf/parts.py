"""Parts of matrices of codes: what one rank of a tensor-parallel model keeps of a matrix, and how parts are joined."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..codec import LOG_BITS, SCALARS, is_packed
from ..nn import Coded, CodedWeight, QINSExperts, field_layout

Tensor = torch.Tensor
Span = tuple[int, int]  # begin and end


@dataclass(frozen=True)
class Part:
    """What a rank keeps of a matrix (out, in), or of a stack of matrices (experts, out, in).

    A border between the columns of two ranks may be inside a group or inside a block of packed codes. The parts on both
    sides then have up to 63 columns of the neighbor, so that codes stay whole bytes and groups stay fast to multiply. A
    rank has no input for these columns; zeros stand in for it. A part that begins inside a group has smaller groups.

    Attributes:
        codec: of the codes.
        shape: of the whole.
        group_size: of the whole.
        spans: for each dimension, what is kept of it; one span of columns.
        padding: number of the part's first and last columns for which the rank has no input.

    """

    codec: str
    shape: tuple[int, ...]
    group_size: int | None
    spans: tuple[tuple[Span, ...], ...]
    padding: Span

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(sum(end - begin for begin, end in spans) for spans in self.spans)

    @property
    def own_group_size(self) -> int | None:
        """Group size of the part: the whole's, or a divisor of it if the part begins inside a group."""
        size, begin = self.group_size, self.spans[-1][0][0]
        if size is None or begin % size == 0:
            return size
        common = math.gcd(size, begin)
        return 32 if common % 32 == 0 and common % 64 else common

    @property
    def own_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each field of the part."""
        return field_layout(self.codec, self.own_shape, self.own_group_size)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole's fields."""
        layout = field_layout(self.codec, self.shape, self.group_size).values()
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout)

    @property
    def of_each(self) -> Part:
        """The part of each matrix of a stack."""
        return replace(self, shape=self.shape[1:], spans=self.spans[1:])

    def cut(self, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part of the whole's fields; the result owns its memory."""
        return {name: self._cut(name, t) for name, t in fields.items()}

    def _cut(self, name: str, t: Tensor) -> Tensor:
        whole = t
        for dim, spans in enumerate(self._spans(name)):
            parts = [t.narrow(dim, begin, end - begin) for begin, end in spans]
            t = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        if self._divides(name):
            return t.index_select(-1, self._groups())
        copied = t.is_contiguous() and t.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        return t if copied else t.clone(memory_format=torch.contiguous_format)

    def join(self, whole: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Write the part's fields into the whole's. Where parts overlap, they are equal."""
        for name, t in own.items():
            if self._divides(name):
                groups = self._groups()
                first = torch.searchsorted(groups, torch.arange(int(groups[-1]) + 1))
                t = t.index_select(-1, first)
            for there, here in _places(self._spans(name)):
                whole[name][there] = t[here]

    def _spans(self, name: str) -> tuple[tuple[Span, ...], ...]:
        """Return what is kept of each dimension of a field of the whole."""
        if name in SCALARS[self.codec]:
            return self.spans[:-2]
        if name == "scale":
            return self.spans[:-1]
        begin, end = self.spans[-1][0]
        if name == "group_scale":
            assert self.group_size is not None
            begin, end = begin // self.group_size, -(-end // self.group_size)
        elif name == "sign_bits":
            begin, end = begin // 8, -(-end // 8)
        elif is_packed(self.codec):
            begin, end = (at // 8 * LOG_BITS[self.codec] for at in (begin, end))
        return *self.spans[:-1], ((begin, end),)

    def _divides(self, name: str) -> bool:
        """Return whether a field is of groups that the part divides."""
        return name == "group_scale" and self.own_group_size != self.group_size

    def _groups(self) -> Tensor:
        """Return, for each of the part's groups, the number of the whole's group, counted from the first one kept."""
        size, own = self.group_size, self.own_group_size
        assert size is not None
        assert own is not None
        begin, end = self.spans[-1][0]
        return torch.arange(begin, end, own) // size - begin // size


def _places(spans: tuple[tuple[Span, ...], ...]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield where each piece of a part is in the whole, and where it is in the part."""
    pieces = []
    for of_dimension in spans:
        at, found = 0, []
        for begin, end in of_dimension:
            found.append((slice(begin, end), slice(at, at + end - begin)))
            at += end - begin
        pieces.append(found)
    for chosen in itertools.product(*pieces):
        yield tuple(there for there, _ in chosen), tuple(here for _, here in chosen)


def part_of(codec: str, shape: tuple[int, ...], group_size: int | None, spans: tuple[tuple[Span, ...], ...]) -> Part:
    """Return the part of a matrix, or of a stack of matrices, that has these spans of rows and columns.

    Args:
        codec: of the codes.
        shape: (out, in), or (experts, out, in), of the whole.
        group_size: of the whole.
        spans: for each dimension, in order.

    Raises:
        ValueError: nothing is left of a dimension, or the columns are in several spans.

    """
    for size, of_dimension, what in zip(reversed(shape), reversed(spans), ("columns", "rows", "experts"), strict=False):
        if not any(end > begin for begin, end in of_dimension):
            raise ValueError(f"{size} {what} are too few: a rank would have none")
    if len(spans[-1]) > 1:
        raise ValueError(f"expected one span of columns for each rank, got {len(spans[-1])}")
    begin, end = spans[-1][0]
    unit = 64 if is_packed(codec) else 8 if codec == "log9" else math.gcd(group_size, 32) if group_size else 1
    first = begin // unit * unit
    last = min(-(-end // unit) * unit, shape[-1])
    return Part(codec, shape, group_size, (*spans[:-1], ((first, last),)), (begin - first, last - end))


def parts_of(module: nn.Module) -> dict[str, Part]:
    """Return what this rank keeps of a module's matrices: by projection for experts, else under the empty string."""
    found: dict[str, Part] = module.__dict__.get("parts", {})
    return found


def narrow(module: Coded, stack: str = "") -> Part | None:
    """Give a module the shape of this rank's part of a matrix; return the part, or None if it is whole."""
    part = parts_of(module).get(stack)
    if part is None:
        return None
    if isinstance(module, QINSExperts):
        module.shapes[stack] = part.own_shape  # type: ignore[assignment]
        module.group_sizes[stack] = part.own_group_size
    else:
        assert isinstance(module, CodedWeight)
        module._shape, module.group_size = part.own_shape, part.own_group_size  # type: ignore[assignment]
    for field, (shape, dtype) in part.own_layout.items():
        module._buffers[buffer_name(stack, field)] = torch.empty(shape, dtype=dtype, device="meta")
    return part


def buffer_name(stack: str, field: str) -> str:
    """Return the name of the buffer of a field; `stack` is empty except for experts."""
    return f"{stack}_{field}" if stack else field
