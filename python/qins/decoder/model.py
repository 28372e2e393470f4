"""A decoder-only language model on the core: token ids in, logits or token ids out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..codec import CODEC_NUMBER, EncodedArray, core_addresses, field_names, matmul
from ..system import get_num_threads
from .families import shape_of
from .tensors import Tensors

Array = np.ndarray[Any, Any]

_LEAST_ROOM = 64  # initial capacity of the cache, in tokens
_FLOAT32 = 0  # the core's number of this dtype
_NO_ROTATION = (0, 0, 0)


class Decoder:
    """A converted model, with the keys and values of the tokens it has seen.

    NumPy is its only dependency. Weights stay in the mapped files; activations and the cache are float32.

    Attributes:
        vocabulary: number of tokens that the model knows; ids are 0 to vocabulary - 1.
        past: number of tokens in the cache.

    """

    def __init__(self, tensors: Tensors) -> None:
        """For internal use; `Decoder.open` opens a checkpoint."""
        self._shape = shape = shape_of(tensors.config)
        tensors.place_codes()
        self.vocabulary = shape.vocabulary
        self.past = 0
        self._kept: list[Any] = []  # what the core reads by address
        table = (shape.vocabulary, shape.hidden)
        self._embedding = tensors.codes("model.embed_tokens", table)
        self._table = tensors.floats("model.embed_tokens.weight", table) if self._embedding is None else None
        self._layers = [self._layer(tensors, i) for i in range(shape.layers)]
        self._norm = self._weight(tensors, "model.norm.weight", shape.hidden)
        self._head = tensors.codes("lm_head", table)
        self._float_head: Array | None = None
        if self._head is None and shape.tied and "lm_head.weight" not in tensors:
            self._head, self._float_head = self._embedding, self._table
        elif self._head is None:
            self._float_head = tensors.floats("lm_head.weight", table)
        self._room = 0
        self._cache: Array = np.empty((0,), np.float32)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Decoder:
        """Open a checkpoint that `qins quantize` or `save_pretrained` wrote.

        Args:
            path: its directory.

        Raises:
            FileNotFoundError: there is no such directory.
            ValueError: it is damaged, its family is not supported (`qins.decoder.families.FAMILIES` has them), or a
                linear layer is not quantized.

        """
        return cls(Tensors(Path(path)))

    # -- reading the checkpoint ----------------------------------------------------------------------

    def _weight(self, tensors: Tensors, name: str, size: int) -> Array:
        weight = tensors.floats(name, (size,))
        weight = np.ascontiguousarray(weight + np.float32(1) if self._shape.family.gemma else weight)
        if weight.ctypes.data % 4:
            weight = weight.copy()
        self._kept.append(weight)
        return weight

    def _product(self, tensors: Tensors, module: str, shape: tuple[int, int]) -> tuple[int, ...]:
        """Return the core's arguments for a linear layer."""
        e = tensors.codes(module, shape)
        if e is None:
            raise ValueError(f"{tensors.path}: {module}: expected codes; Decoder needs all linear layers quantized")
        bias = 0
        if f"{module}.bias" in tensors:
            kept = tensors.floats(f"{module}.bias", (shape[0],)).copy()
            self._kept.append(kept)
            bias = kept.ctypes.data
        return (*self._numbers(e), bias)

    def _numbers(self, e: EncodedArray) -> tuple[int, ...]:
        self._kept.append(e)
        at = [e.fields[n].ctypes.data for n in field_names(e.codec, e.group_size)]
        return (CODEC_NUMBER[e.codec], *core_addresses(at, e.codec, e.group_size), *e.shape, e.group_size or 0)

    def _layer(self, tensors: Tensors, i: int) -> Any:
        s, prefix = self._shape, f"model.layers.{i}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        if s.family.fused:
            three: list[Any] = [self._product(tensors, f"{attention}qkv_proj", (q + 2 * kv, s.hidden)), None, None]
            two: list[Any] = [self._product(tensors, f"{mlp}gate_up_proj", (2 * s.inner, s.hidden)), None]
        else:
            sizes = {"q": q, "k": kv, "v": kv}
            three = [self._product(tensors, f"{attention}{n}_proj", (size, s.hidden)) for n, size in sizes.items()]
            two = [self._product(tensors, f"{mlp}{n}_proj", (s.inner, s.hidden)) for n in ("gate", "up")]
        products = (
            *three, self._product(tensors, f"{attention}o_proj", (s.hidden, q)),
            *two, self._product(tensors, f"{mlp}down_proj", (s.hidden, s.inner)),
        )  # fmt: skip
        norms = [
            0 if n is None else self._weight(tensors, f"{prefix}{n}.weight", s.hidden).ctypes.data
            for n in s.family.norms
        ]
        sizes_of_heads = {"": (0, 0), "head": (s.head_dim, s.head_dim), "row": (q, kv)}[s.family.head_norms]
        for n, size in zip("qk", sizes_of_heads, strict=True):
            norms.append(self._weight(tensors, f"{attention}{n}_norm.weight", size).ctypes.data if size else 0)
        return _core.decoder_layer(
            products,
            (*norms, 0),
            (s.hidden, s.heads, s.kv_heads, s.head_dim, s.inner, int(s.family.head_norms == "head"), s.activation),
            (s.epsilon, s.epsilon, s.scaling, s.softcap, s.residual),
        )

    # -- running it ------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens."""
        self.past = 0

    def crop(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens.

        Raises:
            ValueError: there are fewer.

        """
        if not 0 <= tokens <= self.past:
            raise ValueError(f"tokens: expected 0 to {self.past}, got {tokens!r}")
        self.past = tokens

    def logits(self, ids: Sequence[int] | Array, *, every: bool = False) -> Array:
        """Run tokens that follow those in the cache.

        Args:
            ids: token ids, at least one.
            every: return the logits after each of them, not only after the last.

        Returns:
            logits of the next token, float32 of shape (vocabulary,); with `every`, (len(ids), vocabulary).

        Raises:
            ValueError: an id is out of range, or there is none. The cache is then unchanged.
            MemoryError: the cache cannot grow.

        """
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise ValueError(f"ids: expected a sequence of integers, got dtype {tokens.dtype}, shape {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            wrong = tokens[(tokens < 0) | (tokens >= self.vocabulary)][0]
            raise ValueError(f"ids: expected 0 to {self.vocabulary - 1}, got {wrong}")
        self._grow(self.past + len(tokens))
        before, states = self.past, []
        try:
            for begin in range(0, len(tokens), _core.DECODER_ROWS):
                states.append(self._run(tokens[begin : begin + _core.DECODER_ROWS]))
        except BaseException:
            self.past = before
            raise
        hidden = np.concatenate(states) if every else states[-1][-1:]
        found = self._logits_of(hidden)
        return found if every else found[0]

    def generate(
        self,
        ids: Sequence[int] | Array,
        max_new_tokens: int = 64,
        *,
        stop: Iterable[int] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Yield the tokens that follow.

        Args:
            ids: token ids that follow those in the cache, at least one.
            max_new_tokens: maximum number of tokens to yield.
            stop: token ids at which to stop; such a token is yielded.
            temperature: 0 yields the likeliest token each time; else tokens are sampled.
            top_k: sample from this many of the likeliest tokens.
            top_p: sample from the likeliest tokens up to this total probability.
            min_p: sample from the tokens at least this many times as likely as the likeliest one.
            seed: of the sampling; None: a different one each time.

        Raises:
            ValueError: an argument is out of range.

        """
        if not temperature >= 0.0 or (top_k is not None and top_k < 1):
            raise ValueError(f"expected temperature >= 0 and top_k >= 1, got {temperature!r} and {top_k!r}")
        for name, share in {"top_p": top_p, "min_p": min_p}.items():
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{name}: expected 0 to 1, got {share!r}")
        rng = np.random.default_rng(seed)

        def choose(logits: Array) -> int:
            if temperature == 0.0:
                return int(logits.argmax())
            return _sample(logits / temperature, top_k, top_p, min_p, rng)

        return self._tokens(ids, max_new_tokens, set(stop), choose)

    def _tokens(
        self, ids: Sequence[int] | Array, count: int, stop: set[int], choose: Callable[[Array], int]
    ) -> Iterator[int]:
        for _ in range(count):
            token = choose(self.logits(ids))
            yield token
            if token in stop:
                return
            ids = [token]

    def _grow(self, tokens: int) -> None:
        """Make room in the cache: layers x (keys, values) x kv_heads x room x head_dim."""
        if tokens <= self._room:
            return
        s = self._shape
        room = max(_LEAST_ROOM, 1 << (tokens - 1).bit_length())
        cache = np.empty((s.layers, 2, s.kv_heads, room, s.head_dim), np.float32)
        if self.past:
            cache[..., : self.past, :] = self._cache[..., : self.past, :]
        self._cache, self._room = cache, room

    def _run(self, tokens: Array) -> Array:
        """Run up to _core.DECODER_ROWS tokens; return their hidden states."""
        s, count, past = self._shape, len(tokens), self.past
        x = self._embed(tokens)
        position = np.arange(past, past + count, dtype=np.float32)[:, None]
        rotations = {key: _Rotation(position * frequencies) for key, frequencies in s.frequencies.items()}
        masks: dict[int, Array] = {}
        # addresses are computed from the first ones: asking an array for its own takes a microsecond
        x_at, keys_at, threads = x.ctypes.data, self._cache.ctypes.data, get_num_threads()
        of_token = s.head_dim * self._cache.itemsize
        next_tensor = s.kv_heads * self._room * of_token
        for i, layer in enumerate(self._layers):
            window = s.windows[i]
            cos, sin, dim = rotations[s.layer_types[i]].numbers if s.rotates[i] else _NO_ROTATION
            mask_at = skipped = 0
            if count > 1:
                window = window if window < past + count else 0
                if window not in masks:
                    masks[window] = _mask(count, past, window)
                mask_at = masks[window].ctypes.data
            elif window:  # one token sees the end of the cache
                skipped = max(0, past + 1 - window)
            at = keys_at + 2 * i * next_tensor + skipped * of_token
            _core.decode_layer(
                layer, _FLOAT32, x_at, x_at, 1, count, at, at + next_tensor, self._room, past - skipped,
                cos, sin, dim, 0, mask_at, 1, 0, past + count, threads,
            )  # fmt: skip
        self.past = past + count
        return x

    def _embed(self, tokens: Array) -> Array:
        s = self._shape
        x = np.empty((len(tokens), s.hidden), np.float32)
        for row, token in enumerate(tokens):
            if self._embedding is None:
                assert self._table is not None
                x[row] = self._table[token]
            else:
                self._embedding.decode_block(x[row : row + 1], "float32", int(token), 0)
        return x if s.embedding == 1.0 else x * np.float32(s.embedding)

    def _logits_of(self, hidden: Array) -> Array:
        s = self._shape
        square = np.mean(np.square(hidden), axis=1, keepdims=True)
        normed = np.ascontiguousarray(hidden / np.sqrt(square + np.float32(s.epsilon)) * self._norm)
        if self._head is not None:
            logits = matmul(normed, self._head)
        else:
            assert self._float_head is not None
            logits = normed @ self._float_head.T
        if s.logits != 1.0:
            logits /= np.float32(s.logits)
        if s.final_softcap:
            logits = np.tanh(logits / np.float32(s.final_softcap)) * np.float32(s.final_softcap)
        return logits


class _Rotation:
    """Cosines and sines of a rotary embedding, by halves of a head; `numbers` are their addresses and their number."""

    def __init__(self, angles: Array) -> None:
        both = np.concatenate([angles, angles], axis=1)
        self._cos, self._sin = np.cos(both), np.sin(both)
        self.numbers = (self._cos.ctypes.data, self._sin.ctypes.data, both.shape[1])


def _mask(count: int, past: int, window: int) -> Array:
    """Return which keys each of `count` queries sees, as bytes of shape (count, past + count)."""
    query, key = np.arange(past, past + count)[:, None], np.arange(past + count)
    sees = key <= query
    if window:
        sees &= key > query - window
    return np.ascontiguousarray(sees)


def _sample(
    logits: Array, top_k: int | None, top_p: float | None, min_p: float | None, rng: np.random.Generator
) -> int:
    order = np.argsort(-logits, kind="stable")[:top_k]
    probability = np.exp((logits[order] - logits[order[0]]).astype(np.float64))
    kept = len(order)
    if min_p is not None:
        kept = max(1, int((probability >= min_p).sum()))
    if top_p is not None:
        kept = min(kept, int(np.searchsorted(np.cumsum(probability), top_p * probability.sum())) + 1)
    total = np.cumsum(probability[:kept])
    return int(order[min(int(np.searchsorted(total, rng.random() * total[-1], side="right")), kept - 1)])
