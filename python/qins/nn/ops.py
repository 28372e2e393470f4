"""torch operators on codes: embedding lookup, and x @ W.T without a dequantized copy of W.

Codes are passed as a list of tensors, `fields`, in the order of `field_names`. The operators are registered with
torch.library, so torch.compile and torch.export treat each as one operation.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .. import _core
from ..codec import (
    CODEC_NUMBER,
    DTYPE_NUMBER,
    SCALARS,
    Blocks,
    code_columns,
    core_addresses,
    decode_fields,
    decode_on_device,
    field_names,
    isas,
)
from ..system import threads

Tensor = torch.Tensor

# Scratch for dequantized tiles: at most 6 x 4 MiB in the whole process, however many calls run.
_SCRATCH_BYTES = 4 << 20
_SCRATCHES = 6
_scratch: queue.LifoQueue[Tensor | None] = queue.LifoQueue()
for _ in range(_SCRATCHES):
    _scratch.put(None)


@contextmanager
def _borrow_scratch() -> Iterator[Tensor]:
    """Yield one scratch buffer; wait while all are in use."""
    buffer = _scratch.get()
    try:
        if buffer is None:
            buffer = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8)
        yield buffer
    finally:
        _scratch.put(buffer)


# Up to this many rows of x go through the fused kernels; more go through dequantized tiles and torch's own BLAS.
# Measured with benchmarks/linear.py; `set_fused_rows` changes it. None: all rows on an instruction set with bfloat16
# arithmetic, _FUSED_ROWS_BF16 on others.
_fused_rows: dict[torch.dtype, int | None] = {
    torch.float32: sys.maxsize,
    torch.bfloat16: None,
    torch.float16: sys.maxsize,
}
_BF16_ISAS = frozenset(name for name in isas() if _core.has_bf16(name))
# torch's bfloat16 is fast on processors with such instructions, and slower than float32 on other x86 processors. It has
# not been measured on the rest.
_FUSED_ROWS_BF16 = 256 if _BF16_ISAS else sys.maxsize if "avx2" in isas() else 32


def _is_fused(dtype: torch.dtype, batch: int) -> bool:
    most = _fused_rows.get(dtype, 0)
    if most is None:
        return batch <= _FUSED_ROWS_BF16 or _core.isa() in _BF16_ISAS
    return batch <= most


def set_fused_rows(rows: int, dtype: torch.dtype | None = None) -> None:
    """Let up to `rows` rows of x go through the fused kernels, for one dtype of x or for all."""
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
        raise ValueError(f"rows: expected an integer >= 0, got {rows!r}")
    if dtype is not None and dtype not in _fused_rows:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _fused_rows))}, got {dtype}")
    for d in _fused_rows if dtype is None else [dtype]:
        _fused_rows[d] = rows


def numbers_of(fields: Sequence[Tensor], codec: str, group_size: int | None) -> tuple[int, ...] | None:
    """Describe codes by address for the core, or None if it cannot use them. The caller keeps the tensors alive."""
    if not all(f.is_cpu and f.is_contiguous() for f in fields):
        return None
    return (
        CODEC_NUMBER[codec],
        *core_addresses([f.data_ptr() for f in fields], codec, group_size),
        fields[0].shape[0],
        code_columns(codec, fields[0].shape[1]),
        group_size or 0,
    )


def multiply_codes(x: Tensor, fields: Sequence[Tensor], codec: str, group_size: int | None) -> Tensor:
    """X @ W.T, without torch's dispatcher and without a gradient."""
    # Every step to the kernels must be cheap: a small layer takes only ten microseconds.
    codes, second = fields[0], fields[1]
    rows, cols = codes.shape[0], code_columns(codec, codes.shape[1])
    shape, dtype = x.shape, x.dtype
    if not shape or shape[-1] != cols:
        raise ValueError(f"x: expected shape (..., {cols}), got {tuple(shape)}")
    if not x.is_cpu:
        return torch.nn.functional.linear(x, decode_on_device(codec, group_size, fields, dtype))
    batch = x.numel() // cols if cols else 0
    if (
        batch
        and _is_fused(dtype, batch)
        and codes.is_contiguous()
        and second.is_contiguous()
        and fields[2].is_contiguous()
    ):
        if not x.is_contiguous():
            x = x.contiguous()
        out = x.new_empty(*shape[:-1], rows)
        codes_at, second_at, third_at, scalar_at, scalar2_at = core_addresses(
            [f.data_ptr() for f in fields], codec, group_size
        )
        x_at, out_at, in_use = x.data_ptr(), out.data_ptr(), threads._chosen or torch.get_num_threads()
        _core.linear_at(
            CODEC_NUMBER[codec], codes_at, second_at, third_at, scalar_at, scalar2_at, rows, cols, group_size or 0,
            x_at, batch, DTYPE_NUMBER[dtype], out_at, in_use,
        )  # fmt: skip
        return out
    return _multiply_tiles(x, fields, codec, group_size)


def _multiply_tiles(x: Tensor, fields: Sequence[Tensor], codec: str, group_size: int | None) -> Tensor:
    blocks = Blocks(codec, group_size, fields)
    x2 = x.reshape(-1, blocks.cols)
    out = x.new_empty(x2.shape[0], blocks.rows)
    with _borrow_scratch() as scratch:
        for tile_rows, tile_cols, tile in blocks.tiles(x.dtype, scratch):
            part = x2[:, tile_cols] @ tile.T
            if tile_cols.start == 0:
                out[:, tile_rows] = part
            else:
                out[:, tile_rows] += part
    if blocks.cols == 0:
        out.zero_()
    return out.reshape(*x.shape[:-1], blocks.rows)


def multiply_codes_transposed(g: Tensor, fields: Sequence[Tensor], codec: str, group_size: int | None) -> Tensor:
    """G @ W, without torch's dispatcher and without a gradient."""
    if g.device.type != "cpu":
        return g @ decode_on_device(codec, group_size, fields, g.dtype)
    blocks = Blocks(codec, group_size, fields)
    g2 = g.reshape(-1, blocks.rows)
    # a sum over tiles of rows, so at least in float32
    out = torch.zeros(g2.shape[0], blocks.cols, dtype=torch.promote_types(g.dtype, torch.float32))
    with _borrow_scratch() as scratch:
        for rows, cols, tile in blocks.tiles(g.dtype, scratch):
            out[:, cols] += g2[:, rows] @ tile
    return out.to(g.dtype).reshape(*g.shape[:-1], blocks.cols)


# Operators state their schemas because torch 2.4 cannot infer them from annotations that are strings.
@torch.library.custom_op(
    "qins::linear", mutates_args=(), schema="(Tensor x, Tensor[] fields, str codec, SymInt group_size) -> Tensor"
)
def linear(x: Tensor, fields: list[Tensor], codec: str, group_size: int) -> Tensor:
    """X @ W.T; x (..., in_features) in float32, bfloat16, float16 or float64, the result in x's dtype."""
    return multiply_codes(x, fields, codec, group_size or None)


@linear.register_fake
def _linear_shape(x: Tensor, fields: list[Tensor], codec: str, group_size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], fields[0].shape[0])


@torch.library.custom_op(
    "qins::linear_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor[] fields, str codec, SymInt group_size) -> Tensor",
)
def linear_backward(g: Tensor, fields: list[Tensor], codec: str, group_size: int) -> Tensor:
    """G @ W; g (..., out_features), the result in g's dtype."""
    return multiply_codes_transposed(g, fields, codec, group_size or None)


@linear_backward.register_fake
def _linear_backward_shape(g: Tensor, fields: list[Tensor], codec: str, group_size: int) -> Tensor:
    return g.new_empty(*g.shape[:-1], code_columns(codec, fields[0].shape[1]))


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, fields, ctx.codec, ctx.group_size = inputs
    ctx.save_for_backward(*fields)


def _backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
    fields = list(ctx.saved_tensors)
    return linear_backward(g, fields, ctx.codec, ctx.group_size), [None] * len(fields), None, None


def _double_backward(ctx, gg: Tensor):  # type: ignore[no-untyped-def]
    fields = list(ctx.saved_tensors)
    return linear(gg, fields, ctx.codec, ctx.group_size), [None] * len(fields), None, None


linear.register_autograd(_backward, setup_context=_save_for_backward)
linear_backward.register_autograd(_double_backward, setup_context=_save_for_backward)


def _look_up(ids: Tensor, fields: list[Tensor], codec: str, group_size: int, dtype: torch.dtype) -> Tensor:
    names = field_names(codec, group_size or None)
    flat = ids.reshape(-1)
    rows = {n: f if n in SCALARS[codec] else f.index_select(0, flat) for n, f in zip(names, fields, strict=True)}
    decoded = decode_fields(codec, rows, group_size or None, dtype)
    return decoded.reshape(*ids.shape, decoded.shape[1])


@torch.library.custom_op(
    "qins::embedding",
    mutates_args=(),
    schema="(Tensor ids, Tensor[] fields, str codec, SymInt group_size, ScalarType dtype) -> Tensor",
)
def embedding(ids: Tensor, fields: list[Tensor], codec: str, group_size: int, dtype: torch.dtype) -> Tensor:
    """Dequantize rows of a matrix: ids (...) to (..., columns)."""
    return _look_up(ids, fields, codec, group_size, dtype)


@embedding.register_fake
def _embedding_shape(ids: Tensor, fields: list[Tensor], codec: str, group_size: int, dtype: torch.dtype) -> Tensor:
    return fields[0].new_empty(*ids.shape, code_columns(codec, fields[0].shape[1]), dtype=dtype)


def is_watched() -> bool:
    """Return whether operations are traced or transformed, so that a call around torch's dispatcher would be missed."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def multiply(x: Tensor, fields: list[Tensor], codec: str, group_size: int | None) -> Tensor:
    """Compute `linear`, bypassing torch's dispatcher when neither a gradient nor a graph is needed."""
    if type(x) is Tensor and x.is_cpu and not (x.requires_grad and torch.is_grad_enabled()) and not is_watched():
        return multiply_codes(x, fields, codec, group_size)
    y: Tensor = linear(x, fields, codec, group_size or 0)
    return y


def look_up(ids: Tensor, fields: list[Tensor], codec: str, group_size: int | None, dtype: torch.dtype) -> Tensor:
    """Compute `embedding`, bypassing torch's dispatcher when no graph is needed."""
    if type(ids) is Tensor and ids.is_cpu and not is_watched():
        return _look_up(ids, fields, codec, group_size or 0, dtype)
    y: Tensor = embedding(ids, fields, codec, group_size or 0, dtype)
    return y
