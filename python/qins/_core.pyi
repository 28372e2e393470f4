from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

CODECS: tuple[str, ...]
WAYS: tuple[str, ...]
MU_MAX: float
DECODER_ROWS: int  # maximum number of tokens per call of decode_layer
DECODER_HEAD_DIM: int  # maximum number of elements of a head

def encode(
    codec: str,
    weights: Array,
    dtype: str,
    arrays: tuple[Array, ...],
    group_size: int,
    parameter: float,
    importance: Array | None,
    threads: int,
    /,
) -> tuple[float, ...]: ...
def feedback(
    codec: str,
    weights: Array,
    order: Array,
    feedback: Array,
    arrays: tuple[Array, ...],
    mu: float,
    group_size: int,
    threads: int,
    /,
) -> None: ...
def decode(
    codec: str,
    arrays: tuple[Array, ...],
    scalars: tuple[float, ...],
    rows: int,
    cols: int,
    group_size: int,
    out: Array,
    dtype: str,
    row: int,
    col: int,
    threads: int,
    /,
) -> None: ...
def linear(
    codec: str,
    arrays: tuple[Array, ...],
    scalars: tuple[float, ...],
    rows: int,
    cols: int,
    group_size: int,
    x: Array,
    dtype: str,
    y: Array,
    threads: int,
    /,
) -> None: ...
def linear_at(
    codec: int,
    codes: int,
    second: int,
    third: int,
    first_scalar: int,
    second_scalar: int,
    rows: int,
    cols: int,
    group_size: int,
    x: int,
    batch: int,
    dtype: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def rational(source: Array, alpha: float, back: bool, out: Array, threads: int, /) -> None: ...
def cache_at(
    write: bool,
    codec: int,
    codes: int,
    second: int,
    third: int,
    heads: int,
    room: int,
    dim: int,
    start: int,
    tokens: int,
    x: int,
    dtype: int,
    threads: int,
    /,
) -> bool: ...
def way(codec: str, mu: float, group_size: int, batch: int, dtype: str, /) -> str: ...
def force_way(name: str | None, /) -> None: ...
def read(array: Array, threads: int, /) -> None: ...
def exact_encode(
    codec: str,
    arrays: tuple[Array, ...],
    scalars: tuple[float, ...],
    rows: int,
    cols: int,
    group_size: int,
    weights: Array,
    dtype: str,
    threads: int,
    /,
) -> bytes: ...
def exact_decode(
    codec: str,
    arrays: tuple[Array, ...],
    scalars: tuple[float, ...],
    rows: int,
    cols: int,
    group_size: int,
    weights: Array,
    dtype: str,
    threads: int,
    stream: Array,
    /,
) -> bool: ...
def levels(codec: str, scalars: tuple[float, ...], /) -> bytes: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def has_bf16(name: str, /) -> bool: ...
def set_isa(name: str, /) -> None: ...
def set_fork_join(address: int, /) -> None: ...
def decoder_layer(
    products: tuple[tuple[int, ...] | None, ...],
    norms: tuple[int, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float, ...],
    /,
) -> object: ...
def decode_layer(
    layer: object,
    dtype: int,
    x: int,
    y: int,
    sequences: int,
    tokens: int,
    keys: int,
    values: int,
    room: int,
    past: int,
    cos: int,
    sin: int,
    rotary_dim: int,
    rotary_next: int,
    mask: int,
    mask_is_bool: int,
    mask_sequence: int,
    mask_token: int,
    threads: int,
    keys_kind: int = 0,
    keys_second: int = 0,
    keys_third: int = 0,
    values_kind: int = 0,
    values_second: int = 0,
    values_third: int = 0,
    slot: int = 0,
    begin: int = 0,
    slot_count: int = 0,
    slots: int = 0,
    /,
) -> bool: ...
def decode_layers(
    places: list[tuple[object, tuple[int, int, int, int], tuple[int, int, int, int], int, int, int]],
    dtype: int,
    x: int,
    y: int,
    y_next: int,
    sequences: int,
    cos: int,
    sin: int,
    rotary_next: int,
    mask: int,
    mask_is_bool: int,
    mask_sequence: int,
    threads: int,
    /,
) -> int: ...
def are_unchanged(
    values: tuple[tuple[dict[str, Any], str, Any], ...], empty: tuple[dict[Any, Any], ...], /
) -> bool: ...
def norm_at(dtype: int, x: int, rows: int, n: int, weight: int, epsilon: float, y: int, threads: int, /) -> None: ...
def gate_at(
    dtype: int, gate: int, up: int, next: int, rows: int, n: int, activation: int, y: int, threads: int, /
) -> None: ...
def rotate_at(
    dtype: int,
    x: int,
    y: int,
    cosine: int,
    sine: int,
    sequences: int,
    tokens: int,
    heads: int,
    half: int,
    next_head: int,
    x_sequence: int,
    x_token: int,
    y_sequence: int,
    y_token: int,
    next_rotation: int,
    threads: int,
    /,
) -> None: ...
