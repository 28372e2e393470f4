"""What a rank keeps of a matrix: equal to the whole's rows and columns, and joined to the whole's bytes."""

from __future__ import annotations

import itertools

import pytest
import torch

import qins
from qins.codec import encode

pytest.importorskip("transformers")
from qins.hf.parts import Part, part_of

pytestmark = pytest.mark.once

# The borders of two ranks are at column 288, those of three at 192: inside groups of 64, 128 and 192, or at their ends.
ROWS, COLUMNS = 24, 576
FORMATS = [
    *(("log8", size) for size in (None, 20, 32, 64, 96, 128, 192, 576)),
    *(("log6", size) for size in (32, 64, 192)),
    ("log5", 32), ("log4", 32), ("log4", 128), ("log9", None), ("golden", None), ("rational", None),
]  # fmt: skip


def whole(codec, group_size, columns=COLUMNS):
    weight = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(1))
    return qins.QINSLinear.from_linear(linear(weight), codec, group_size=group_size)


def linear(weight):
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = torch.nn.Parameter(weight)
    return made


def module_of(part, fields):
    """Return a QINSLinear with a part's codes."""
    rows, columns = part.own_shape
    made = qins.QINSLinear(columns, rows, bias=False, codec=part.codec, group_size=part.own_group_size)
    made.load_state_dict(fields)  # checks every shape and dtype
    return made


def borders(size, ranks):
    each = -(-size // ranks)
    return [(r * each, min(size, (r + 1) * each)) for r in range(ranks)]


@pytest.mark.filterwarnings("ignore:group_size:UserWarning")
@pytest.mark.parametrize(("codec", "group_size"), FORMATS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_parts_are_cut_and_joined(codec, group_size, ranks):
    layer = whole(codec, group_size)
    fields, values = dict(layer._buffers), layer.weight
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(2))
    parts = []
    for begin, end in borders(COLUMNS, ranks):
        part = part_of(codec, (ROWS, COLUMNS), layer.group_size, (((0, ROWS),), ((begin, end),)))
        module = module_of(part, part.cut(fields))
        before, after = part.padding
        assert max(part.padding) < 64
        assert torch.equal(module.weight[:, before : part.own_shape[1] - after], values[:, begin:end])
        padded = torch.nn.functional.pad(x[:, begin:end], part.padding)
        assert (module(padded) - x[:, begin:end] @ values[:, begin:end].T).norm() < 1e-3 * x.norm()
        parts.append((part, part.cut(fields)))
    rows = [
        part_of(codec, (ROWS, COLUMNS), layer.group_size, (spans, ((0, COLUMNS),)))
        for spans in (((0, 4), (12, 16)), ((4, 12), (16, 24)))  # gate and up in one matrix
    ]
    for part in rows:
        kept = torch.cat([torch.arange(begin, end) for begin, end in part.spans[0]])
        assert part.padding == (0, 0)
        assert part.own_group_size == layer.group_size
        assert torch.equal(module_of(part, part.cut(fields)).weight, values[kept])
    for found in (parts, [(p, p.cut(fields)) for p in rows]):
        joined = {n: torch.full_like(t, 77) for n, t in fields.items()}
        for part, own in found:
            part.join(joined, own)
        assert all(torch.equal(joined[n], t) for n, t in fields.items())


def test_parts_of_columns_that_no_unit_divides():
    """A row's last group and its last byte of signs are shorter than the others."""
    for (codec, size), ranks in itertools.product((("log8", 64), ("log9", None), ("golden", None)), (2, 3)):
        layer = whole(codec, size, 181)
        joined = {n: torch.full_like(t, 77) for n, t in layer._buffers.items()}
        for begin, end in borders(181, ranks):
            part = part_of(codec, (ROWS, 181), size, (((0, ROWS),), ((begin, end),)))
            own = part.cut(layer._buffers)
            kept = module_of(part, own).weight[:, part.padding[0] :][:, : end - begin]
            assert torch.equal(kept, layer.weight[:, begin:end])
            part.join(joined, own)
        assert all(torch.equal(joined[n], t) for n, t in layer._buffers.items())


def test_parts_of_stacks():
    matrices = torch.randn(4, ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    encoded = [encode(m, "log4", group_size=64).fields for m in matrices]
    fields = {n: torch.stack([torch.as_tensor(e[n]) for e in encoded]) for n in encoded[0]}
    joined = {n: torch.zeros_like(t) for n, t in fields.items()}
    for experts, columns in itertools.product(((0, 3), (3, 4)), borders(COLUMNS, 2)):
        part = part_of("log4", (4, ROWS, COLUMNS), 64, ((experts,), ((0, ROWS),), (columns,)))
        own = part.cut(fields)
        for i, e in enumerate(range(*experts)):
            each = part.of_each.cut({n: t[e] for n, t in fields.items()})
            assert all(torch.equal(each[n], own[n][i]) for n in own)
        assert {n: (t.shape, t.dtype) for n, t in own.items()} == part.own_layout
        part.join(joined, own)
    assert all(torch.equal(joined[n], t) for n, t in fields.items())


def test_a_part_owns_its_memory():
    """Otherwise, the whole would stay in memory as long as the part."""
    fields = whole("log8", 64)._buffers
    for spans in ((((0, 12),), ((0, COLUMNS),)), (((0, ROWS),), ((0, COLUMNS),)), (((0, 2), (4, 6)), ((0, COLUMNS),))):
        for name, t in part_of("log8", (ROWS, COLUMNS), 64, spans).cut(fields).items():
            assert t.untyped_storage().data_ptr() != fields[name].untyped_storage().data_ptr()
            assert t.untyped_storage().nbytes() == t.nbytes


@pytest.mark.parametrize(
    ("group_size", "begin", "own"), [(128, 0, 128), (128, 288, 32), (192, 288, 32), (192, 320, 64), (64, 96, 32)]
)
def test_groups_stay_fast(group_size, begin, own):
    part = part_of("log8", (ROWS, COLUMNS), group_size, (((0, ROWS),), ((begin, COLUMNS),)))
    assert (part.own_group_size, part.padding) == (own, (0, 0))


def test_errors():
    with pytest.raises(ValueError, match="24 rows are too few: a rank would have none"):
        part_of("log8", (ROWS, COLUMNS), 64, ((), ((0, COLUMNS),)))
    with pytest.raises(ValueError, match="one span of columns for each rank, got 2"):
        part_of("log8", (ROWS, COLUMNS), 64, (((0, ROWS),), ((0, 64), (128, 192))))
    assert isinstance(part_of("log8", (ROWS, COLUMNS), 64, (((0, 1),), ((0, COLUMNS),))), Part)
