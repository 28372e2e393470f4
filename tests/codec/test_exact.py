"""Residuals that restore bfloat16 and float16 weights from codes, on every instruction set."""

from __future__ import annotations

from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import qins
from qins.codec import residual, restore

CODECS = [
    ("golden", None), ("log9", None), ("log8", None), ("log8", 64), ("log8", 7), ("rational", None),
    ("log6", 64), ("log5", 192), ("log4", 32),
]  # fmt: skip
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def bits(weights):
    return np.ascontiguousarray(weights).view(np.uint16)


def as_weights(numbers, dtype):
    return np.asarray(numbers, np.uint16).view(DTYPES[dtype])


def on_every_isa(weights, e, dtype):
    """Return the stream, the same on every instruction set and number of threads; check that it restores."""
    streams = []
    for name in qins.isas():
        with qins.use_isa(name):
            for threads in (1, 3):
                qins.set_num_threads(threads)
                streams.append(residual(weights, e).tobytes())
                restored = restore(e, np.frombuffer(streams[0], np.uint8), dtype)
                assert restored.shape == weights.shape
                assert np.array_equal(bits(restored), bits(weights)), name
    assert len(set(streams)) == 1
    return np.frombuffer(streams[0], np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("codec", "group"), CODECS)
def test_every_shape(rng, codec, group, dtype):
    for shape in [(0, 8), (3, 0), (1, 8), (5, 16), (3, 72), (2, 4104), (1, 70_000), (2, 3, 40), (300, 320)]:
        w = rng.normal(0, 0.02, shape).astype(DTYPES[dtype])
        e = qins.encode(w.astype(np.float32), codec, group_size=group)
        on_every_isa(w, e, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["log8", "log4", "golden"])
def test_every_number(rng, codec, dtype):
    """All bit patterns, NaN and infinities included, with codes that have nothing to do with them."""
    w = as_weights(rng.permutation(1 << 16).reshape(64, 1024), dtype)
    e = qins.encode(rng.normal(0, 1, w.shape), codec, group_size=None if codec == "golden" else 64)
    stream = on_every_isa(w, e, dtype)
    assert len(stream) < 4 * w.size


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(rng, dtype):
    """Rows of zeros of both signs, of one magnitude, of subnormal and of the largest numbers; scales of 0."""
    zeros = np.where(rng.integers(0, 2, (4, 96)), 0x8000, 0)
    one = np.where(rng.integers(0, 2, (4, 96)), 0xBC01, 0x3C01)
    tiny = rng.integers(0, 9, (4, 96))
    large = rng.integers(0x7B00, 0x7BFF, (4, 96))
    w = as_weights(np.concatenate([zeros, one, tiny, large]), dtype)
    for codec, group in CODECS:
        e = qins.encode(w.astype(np.float32), codec, group_size=group)
        on_every_isa(w, e, dtype)


def levels_of(e):
    """Levels of codes, and the magnitudes by level."""
    if e.codec in reference.BITS:
        bits_of_code = reference.BITS[e.codec]
        half = 1 << (bits_of_code - 1)
        q = reference.unpack(e.fields[f"codes{bits_of_code}"], bits_of_code)
        values = reference.packed_values(float(e.fields["mu"]), bits_of_code)
        return np.where(q < half, q, q - half + 1), np.append(values[:half], -values[-1])
    if e.codec == "log8":
        return e.fields["codes"] & 127, reference.log8_levels(float(e.fields["mu"]))
    stored = np.arange(256, dtype=np.uint8)
    stored[0] = 1
    table = qins.EncodedArray.from_fields(
        "golden",
        {"stored": stored, "sign": np.ones(256, np.int8)} | {n: e.fields[n] for n in ("log_min", "log_max")},
    )
    return e.fields["stored"], table.decode()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("codec", "group"), [("log8", 64), ("log8", None), ("log5", 32), ("log9", None)])
def test_against_the_reference(rng, codec, group, dtype):
    w = (rng.standard_t(3, (9, 8008)) * 0.02).astype(DTYPES[dtype])
    e = qins.encode(w.astype(np.float32), codec, group_size=group)
    stream = reference.ExactStream(residual(w, e).tobytes())
    assert (stream.dtype, stream.rows, stream.cols, len(stream.blocks)) == (dtype, 9, 8008, 2)
    decoded = bits(e.decode(DTYPES[dtype]))
    assert np.array_equal(stream.weights(*levels_of(e)[:1], decoded, levels_of(e)[1]), bits(w))


@pytest.mark.parametrize(("codec", "dtype", "most"), [
    ("log8", "bfloat16", 2.8), ("log8", "float16", 5.8), ("log4", "bfloat16", 7.1), ("log9", "bfloat16", 3.7),
])  # fmt: skip
def test_bits(rng, codec, dtype, most):
    """At most 5 % above the entropy of residuals that are uniform between the middles of neighboring values."""
    w = rng.normal(0, 0.02, (512, 1024)).astype(DTYPES[dtype])
    e = qins.encode(w.astype(np.float32), codec, group_size={"log8": 64, "log4": 32}.get(codec))
    stream = residual(w, e)
    assert 8 * len(stream) / w.size < most
    decoded = e.decode().astype(np.float64)
    levels, values = levels_of(e)
    v = values.astype(np.float64)
    spacing = np.abs(np.gradient(v))[levels] / np.where(v > 0, v, 1)[levels]
    numbers = np.exp2(np.floor(np.log2(np.maximum(np.abs(decoded), 1e-9)))) / 2.0 ** (7 if dtype == "bfloat16" else 10)
    known = decoded != 0
    if codec == "log4":  # every tenth weight is 0, and its residual is not uniform
        return
    uniform = np.log2(np.maximum(spacing * np.abs(decoded) / numbers, 1))[known].mean()
    assert 8 * len(stream) / w.size < 1.05 * uniform + 0.1


def test_calibrated_codes_take_little_more(rng):
    w = rng.normal(0, 0.02, (256, 512)).astype(ml_dtypes.bfloat16)
    x = rng.normal(0, 1, (1024, 16)) @ rng.normal(0, 1, (16, 512)) + rng.normal(0, 0.3, (1024, 512))
    feedback = qins.ErrorFeedback(x.T @ x)
    calibrated = feedback.encode(w.astype(np.float32), "log8", group_size=64)
    nearest = qins.encode(w.astype(np.float32), "log8", group_size=64)
    sizes = [8 * len(on_every_isa(w, e, "bfloat16")) / w.size for e in (nearest, calibrated)]
    assert sizes[0] < sizes[1] < sizes[0] + 0.6


def test_sparse_weights(rng):
    w = rng.normal(0, 0.02, (256, 512)).astype(ml_dtypes.bfloat16)
    w[rng.random(w.shape) < 0.5] = 0
    e = qins.encode(w.astype(np.float32), "log8", group_size=64)
    on_every_isa(w, e, "bfloat16")


def test_what_is_refused(rng):
    w = rng.normal(0, 0.02, (4, 64)).astype(np.float16)
    e = qins.encode(w, "log8", group_size=64)
    with pytest.raises(TypeError, match="weights: expected bfloat16 or float16, got float32"):
        residual(w.astype(np.float32), e)
    with pytest.raises(ValueError, match=r"weights: expected the codes' shape \(4, 64\), got \(64, 4\)"):
        residual(w.T, e)
    stream = residual(w, e)
    with pytest.raises(ValueError, match="dtype: expected bfloat16 or float16, got 'float32'"):
        restore(e, stream, "float32")
    with pytest.raises(ValueError, match="residual: damaged, or not that of these codes in bfloat16"):
        restore(e, stream, "bfloat16")
    other = qins.encode(w[:3], "log8", group_size=64)
    with pytest.raises(ValueError, match="residual: damaged"):
        restore(other, stream, "float16")
    strided = np.empty((4, 128), np.float16)[:, ::2]
    strided[...] = w
    assert np.array_equal(residual(strided, e), stream)


def test_truncation_is_found(isa, rng):
    w = rng.normal(0, 0.02, (40, 64)).astype(ml_dtypes.bfloat16)
    e = qins.encode(w.astype(np.float32), "log8", group_size=64)
    stream = residual(w, e)
    for n in range(len(stream)):
        with pytest.raises(ValueError, match="damaged"):
            restore(e, stream[:n], "bfloat16")
    with pytest.raises(ValueError, match="damaged"):
        restore(e, np.append(stream, np.uint8(0)), "bfloat16")


def test_every_part_must_be_used_up(isa, rng):
    """Changed words and states of lanes nearly always leave other states; superfluous words and bits are noticed."""
    w = rng.normal(0, 0.02, (4, 64)).astype(ml_dtypes.bfloat16)
    e = qins.encode(w.astype(np.float32), "log8", group_size=64)
    stream = residual(w, e)
    begin = reference.ExactStream(stream.tobytes()).at  # of the only block, whose sizes are before it
    words, bits_bytes = (int.from_bytes(stream[begin - n : begin - n + 4].tobytes(), "little") for n in (8, 4))
    end = begin + 64 + 2 * words
    assert end + bits_bytes == len(stream)
    unnoticed = []
    for at in range(begin, end):
        for bit in range(8):
            changed = stream.copy()
            changed[at] ^= 1 << bit
            with suppress(ValueError):
                restore(e, changed, "bfloat16")
                unnoticed.append((at, bit))  # another symbol led to the same state
    assert len(unnoticed) < 0.005 * 8 * (end - begin)

    def resized(at, more, words, bits_bytes):
        sizes = np.frombuffer(words.to_bytes(4, "little") + bits_bytes.to_bytes(4, "little"), np.uint8)
        return np.concatenate([stream[: begin - 8], sizes, stream[begin:at], np.zeros(more, np.uint8), stream[at:]])

    assert np.array_equal(bits(restore(e, resized(end, 0, words, bits_bytes), "bfloat16")), bits(w))
    for changed in (resized(end, 2, words + 1, bits_bytes), resized(len(stream), 1, words, bits_bytes + 1)):
        with pytest.raises(ValueError, match="damaged"):
            restore(e, changed, "bfloat16")


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damage_is_found_or_harmless(data):
    """Changed bytes, codes or scales: an error or other weights, never a crash."""
    rng = np.random.default_rng(data.draw(st.integers(0, 3)))
    codec, group = data.draw(st.sampled_from(CODECS))
    w = rng.normal(0, 0.02, (4, 320)).astype(ml_dtypes.bfloat16)
    e = qins.encode(w.astype(np.float32), codec, group_size=group)
    stream = residual(w, e).copy()
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    with qins.use_isa(data.draw(st.sampled_from(qins.isas()))), suppress(ValueError):
        assert restore(e, stream, "bfloat16").shape == w.shape
