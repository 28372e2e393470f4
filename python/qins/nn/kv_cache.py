"""KV caches: keys in float16, values (and optionally keys) as codes with ranges of their own per token and head."""

from __future__ import annotations

from typing import Any

import torch

from .. import _core
from ..codec import CODEC_NUMBER, DTYPE_NUMBER, LOG_BITS
from ..system import get_num_threads

Tensor = torch.Tensor

# qins_store_kind in decoder.h
_STORE = {"float16": 1, "golden": 2, "log8": 3, "log6": 4, "log5": 5, "log4": 6}
_GROUP_SIZE = 32  # QINS_CACHE_GROUP in qins.h


def check_cache_codec(argument: str, codec: str) -> str:
    """Return the name of a KV cache's codec, or raise the ValueError that lists the codecs."""
    if codec not in _STORE:
        raise ValueError(f"{argument}: expected one of {', '.join(_STORE)}, got {codec!r}")
    return codec


def _fields(name: str, codec: str, dim: int) -> dict[str, tuple[torch.dtype, int]]:
    """Return the tensors that a codec stores for (batch, heads, tokens, head_dim): dtypes and last dimensions."""
    if codec == "float16":
        return {"data": (torch.float16, dim)}
    if codec == "golden":
        return {"stored": (torch.uint8, dim), "sign": (torch.int8, dim), "range": (torch.float32, 2)}
    if codec == "log8":
        return {"codes": (torch.uint8, dim), "scale": (torch.bfloat16, 1)}
    if dim % 8:
        raise ValueError(f"{name}: expected a head_dim that is a multiple of 8 for codec {codec!r}, got {dim}")
    groups = -(-dim // _GROUP_SIZE)
    return {
        "codes": (torch.uint8, dim // 8 * LOG_BITS[codec]),
        "scale": (torch.bfloat16, 1),
        "group_scale": (torch.uint8, groups),
    }


def cache_row_bytes(name: str, codec: str, dim: int) -> int:
    """Return the bytes of one head's keys or values of one token, of `dim` elements.

    Raises:
        ValueError: the codec does not take that many elements.

    """
    return sum(last * dtype.itemsize for dtype, last in _fields(name, codec, dim).values())


class _Tokens:
    """Keys or values of some tokens: tensors of (batch, heads, room, ...) of which the first tokens are in use."""

    def __init__(self, name: str, codec: str, batch: int, heads: int, room: int, dim: int) -> None:
        self.name, self.codec, self.dim = name, codec, dim
        self.fields = {
            field: torch.empty(batch, heads, room, last, dtype=dtype)
            for field, (dtype, last) in _fields(name, codec, dim).items()
        }

    @property
    def room(self) -> int:
        return next(iter(self.fields.values())).shape[2]

    @property
    def batch(self) -> int:
        return next(iter(self.fields.values())).shape[0]

    def nbytes(self, batch: int, tokens: int) -> int:
        """Return the bytes of this many sequences and tokens."""
        return sum(batch * f.shape[1] * tokens * f.shape[3] * f.element_size() for f in self.fields.values())

    def grow(self, room: int, tokens: int) -> None:
        """Make room for more tokens and keep the first ones."""
        for name, old in self.fields.items():
            new = old.new_empty(*old.shape[:2], room, old.shape[3])
            new[:, :, :tokens] = old[:, :, :tokens]
            self.fields[name] = new

    def select(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        for name, old in self.fields.items():
            self.fields[name] = old.index_select(0, indices)

    def _call(self, write: bool, x: Tensor, start: int, tokens: int) -> bool:
        fields = [f.data_ptr() for f in self.fields.values()]
        return _core.cache_at(
            write, CODEC_NUMBER[self.codec], fields[0], fields[1], fields[2] if len(fields) > 2 else 0,
            x.shape[0] * x.shape[1], self.room, self.dim, start, tokens, x.data_ptr(), DTYPE_NUMBER[x.dtype],
            get_num_threads(),
        )  # fmt: skip

    def numbers(self) -> tuple[int, int, int, int]:
        """Return kind and addresses of its tensors, as `_core.decode_layer` takes them."""
        first, second, third = ([f.data_ptr() for f in self.fields.values()] + [0, 0])[:3]
        return _STORE[self.codec], first, second, third

    def write(self, x: Tensor, start: int) -> None:
        """Store x, (batch, heads, tokens, head_dim), as the tokens from `start` on."""
        tokens = x.shape[2]
        if self.codec == "float16":
            kept = self.fields["data"][: x.shape[0], :, start : start + tokens]
            kept.copy_(x)
            finite = bool(torch.isfinite(kept).all())
        else:
            finite = self._call(True, x.detach().contiguous(), start, tokens)
        if not finite:
            bad = int((~torch.isfinite(x)).sum())
            what = (
                f"{bad} NaN or infinite" if bad else f"magnitudes up to {float(x.abs().max()):g}, too large for float16"
            )
            raise ValueError(f"{self.name}: expected finite values, got {what}; nothing was added")

    def read(self, batch: int, tokens: int, dtype: torch.dtype) -> Tensor:
        """Return the first tokens of the first sequences, (batch, heads, tokens, head_dim)."""
        if self.codec == "float16":
            return self.fields["data"][:batch, :, :tokens].to(dtype)
        heads = next(iter(self.fields.values())).shape[1]
        out = torch.empty(batch, heads, tokens, self.dim, dtype=dtype)
        self._call(False, out, 0, tokens)
        return out


def _check_states(k: Tensor, v: Tensor) -> None:
    for name, t in (("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.dim() != 4:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name}: expected a tensor of shape (batch, heads, tokens, head_dim), got {got}")
        if t.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on {t.device}")
        if t.dtype not in DTYPE_NUMBER:
            raise TypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected batch, heads and tokens of k, {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}")


class QINSKVCache:
    """A KV cache of fixed size; the prototype's class of that name.

    Keys are stored in float16. Values are `golden` codes with one range per token and head: 2 bytes per element and 8
    per row. With v_codec="log8", values take 1 byte per element and 2 per row; with "log6", "log5" and "log4", 6, 5 and
    4 bits per element, 2 bytes per row and 1 per 32 elements. k_codec does the same for keys.

    Args:
        max_batch_size: maximum number of sequences.
        max_seq_len: maximum number of tokens per sequence.
        n_heads: heads of keys and values.
        head_dim: elements per head; for log6, log5 and log4 a multiple of 8.
        device: must be the CPU.
        v_codec: codec of the values: "golden", "log8", "log6", "log5", "log4" or "float16".
        k_codec: codec of the keys; same choices.

    """

    def __init__(
        self,
        max_batch_size: int,
        max_seq_len: int,
        n_heads: int,
        head_dim: int,
        device: Any = "cpu",
        *,
        v_codec: str = "golden",
        k_codec: str = "float16",
    ) -> None:
        sizes = {
            "max_batch_size": max_batch_size, "max_seq_len": max_seq_len, "n_heads": n_heads, "head_dim": head_dim,
        }  # fmt: skip
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size!r}")
        if torch.device(device).type != "cpu":
            raise ValueError(f"device: expected the CPU, got {device!r}")
        self.max_batch_size, self.max_seq_len, self.n_heads, self.head_dim = sizes.values()
        shape = (max_batch_size, n_heads, max_seq_len, head_dim)
        self._keys = _Tokens("k", check_cache_codec("k_codec", k_codec), *shape)
        self._values = _Tokens("v", check_cache_codec("v_codec", v_codec), *shape)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.seq_len = self.batch_size = 0
        self._dtype = torch.float32
        self._tokens_first = False

    def update(self, k: Tensor, v: Tensor) -> None:
        """Append keys and values to the sequences.

        Args:
            k: (batch, n_heads, tokens, head_dim) or (batch, tokens, n_heads, head_dim). The sizes decide which; if they
                are ambiguous, heads come first. All updates must have the same order.
            v: values of the same shape.

        Raises:
            ValueError: a shape does not fit, the cache is full, or a value is NaN, infinite or (keys) too large for
                float16. The cache is then unchanged.

        """
        _check_states(k, v)
        tokens_first = k.shape[1] != self.n_heads and k.shape[2] == self.n_heads
        if self.seq_len and self._tokens_first and k.shape[1] == k.shape[2]:
            tokens_first = True
        if self.seq_len and tokens_first != self._tokens_first and k.shape[2 if tokens_first else 1] == self.n_heads:
            raise ValueError(f"k: expected the order of dimensions of the first update, got {tuple(k.shape)}")
        if tokens_first:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        batch, heads, tokens, dim = k.shape
        if (heads, dim) != (self.n_heads, self.head_dim) or v.shape[3] != self.head_dim:
            raise ValueError(
                f"k, v: expected {self.n_heads} heads of {self.head_dim} elements, got k {tuple(k.shape)}, "
                f"v {tuple(v.shape)}"
            )
        if not 1 <= batch <= self.max_batch_size:
            raise ValueError(f"k: expected 1 to {self.max_batch_size} sequences, got {batch}")
        if self.seq_len and batch != self.batch_size:
            raise ValueError(f"k: expected {self.batch_size} sequences, as before, got {batch}; reset() starts over")
        if self.seq_len + tokens > self.max_seq_len:
            raise ValueError(
                f"k: expected at most {self.max_seq_len - self.seq_len} more tokens (max_seq_len {self.max_seq_len}), "
                f"got {tokens}"
            )
        self._keys.write(k, self.seq_len)
        self._values.write(v, self.seq_len)
        self.seq_len += tokens
        self.batch_size, self._dtype, self._tokens_first = batch, k.dtype, tokens_first

    def get_kv(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the first sequences, each (batch_size, n_heads, seq_len, head_dim).

        They have the dtype of the last update's keys and its order of dimensions.
        """
        if not 1 <= batch_size <= self.max_batch_size or (self.seq_len and batch_size > self.batch_size):
            raise ValueError(f"batch_size: expected 1 to {self.batch_size or self.max_batch_size}, got {batch_size}")
        kept = (self._keys, self._values)
        k, v = (t.read(batch_size, self.seq_len, self._dtype) for t in kept)
        return (k.transpose(1, 2), v.transpose(1, 2)) if self._tokens_first else (k, v)

    def memory_savings(self) -> dict[str, float]:
        """Return the bytes of the whole cache, the bytes that it would take in float16 and float32, and the ratios."""
        elements = 2 * self.max_batch_size * self.max_seq_len * self.n_heads * self.head_dim
        return savings(
            self._keys.nbytes(self.max_batch_size, self.max_seq_len),
            self._values.nbytes(self.max_batch_size, self.max_seq_len),
            elements,
        )

    def __repr__(self) -> str:
        return (
            f"QINSKVCache({self.max_batch_size}, {self.max_seq_len}, {self.n_heads}, {self.head_dim}, "
            f"k_codec={self._keys.codec!r}, v_codec={self._values.codec!r}, seq_len={self.seq_len})"
        )


def savings(key_bytes: int, value_bytes: int, elements: int) -> dict[str, float]:
    """Return the bytes of a cache of this many elements, the bytes that it would take as floats, and the ratios."""
    total = key_bytes + value_bytes
    return {
        "key_bytes": key_bytes,
        "value_bytes": value_bytes,
        "total_bytes": total,
        "float16_bytes": 2 * elements,
        "float32_bytes": 4 * elements,
        "compression_float16": 2 * elements / total if total else 1.0,
        "compression_float32": 4 * elements / total if total else 1.0,
    }


class GrowingTokens:
    """The keys and values of one layer, for any number of tokens; the storage of QINSCache's layers."""

    # Initial capacity in tokens. When that is not enough, capacity grows to 1.5 times what is needed.
    _FIRST_ROOM = 128

    def __init__(self, k_codec: str, v_codec: str) -> None:
        self.k_codec, self.v_codec = check_cache_codec("k_codec", k_codec), check_cache_codec("v_codec", v_codec)
        self.length = 0
        self.version = 0  # increases when the tensors are replaced
        self._keys: _Tokens | None = None
        self._values: _Tokens | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, (batch, heads, tokens, head_dim); return all keys and values, dequantized, in their dtypes."""
        _check_states(k, v)
        batch, heads, tokens, _ = k.shape
        if self._keys is None or self._values is None:
            room = max(self._FIRST_ROOM, tokens)
            self.version += 1
            keys = _Tokens("key_states", self.k_codec, batch, heads, room, k.shape[3])
            self._values = _Tokens("value_states", self.v_codec, batch, heads, room, v.shape[3])
            self._keys = keys  # neither if one is refused
        elif self._keys.batch != batch:
            raise ValueError(f"key_states: expected {self._keys.batch} sequences, as before, got {batch}")
        self.reserve(tokens)
        self._keys.write(k, self.length)
        self._values.write(v, self.length)
        self.length += tokens
        return self.read(k.dtype, v.dtype)

    def reserve(self, tokens: int) -> None:
        """Make room for this many more tokens; the cache must not be empty."""
        needed = self.length + tokens
        for kept in (self._keys, self._values):
            if kept is not None and needed > kept.room:
                kept.grow(needed + needed // 2, self.length)
                self.version += 1

    def read(self, k_dtype: torch.dtype, v_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return all keys and values, dequantized; the cache must not be empty."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys.read(self.batch, self.length, k_dtype), self._values.read(self.batch, self.length, v_dtype)

    @property
    def stores(self) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int], int]:
        """What `_core.decode_layer` takes: keys, values, and the tokens that they have room for."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys.numbers(), self._values.numbers(), self._keys.room

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Sequences, heads and head_dim of keys and of values; nothing while the cache is empty."""
        kept = [t for t in (self._keys, self._values) if t is not None and self.length]
        return tuple((*next(iter(t.fields.values())).shape[:2], t.dim) for t in kept)

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.length = min(self.length, length)

    def clear(self) -> None:
        """Forget all tokens and free their memory."""
        self.length, self._keys, self._values = 0, None, None
        self.version += 1

    def select(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        self.version += 1
        for kept in (self._keys, self._values):
            if kept is not None:
                kept.select(indices)

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first tokens."""
        return self._keys.batch if self._keys is not None else 0

    def savings(self) -> tuple[int, int, int]:
        """Return the bytes of keys, the bytes of values, and the number of their elements."""
        if self._keys is None or self._values is None:
            return 0, 0, 0
        shapes = [next(iter(t.fields.values())).shape for t in (self._keys, self._values)]
        elements = sum(
            s[0] * s[1] * self.length * t.dim for s, t in zip(shapes, (self._keys, self._values), strict=True)
        )
        sizes = (t.nbytes(t.batch, self.length) for t in (self._keys, self._values))
        return (*sizes, elements)  # type: ignore[return-value]
