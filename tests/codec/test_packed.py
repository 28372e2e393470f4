"""log6, log5 and log4: packed codes and signed group scales against the reference, on every instruction set."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qins
from qins.codec import Blocks, decode_fields, decode_on_device, field_names

BITS = reference.BITS
CODECS = list(BITS)


def same_bits(a, b):
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


def on_every_isa(function):
    """Return the result, an array, which must be the same bit for bit on every instruction set."""
    results = []
    for name in qins.isas():
        with qins.use_isa(name):
            results.append(function())
    assert all(same_bits(r, results[0]) for r in results)
    return results[0]


def unaligned(array):
    """Return a copy that begins one byte after an aligned address."""
    room = np.zeros(array.nbytes + 1, np.uint8)
    room[1:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return room[1:].view(array.dtype).reshape(array.shape)


def tensors(e):
    return [torch.from_numpy(np.array(e.fields[n])) for n in field_names(e.codec, e.group_size)]


def every_code(codec, group_size, mu):
    """Codes of every q under every group scale, and rows that end in the middle of a block."""
    bits, rows, cols = BITS[codec], 256, 152
    q = np.broadcast_to(np.arange(cols) % (1 << bits), (rows, cols))
    groups = -(-cols // group_size)
    # groups of 32 have half of log6's codes each, so the next one has the same scale
    at = np.arange(groups) // max(1, 64 // group_size)
    group_scale = ((np.arange(rows)[:, None] + 85 * at) % 256).astype(np.uint8)
    fields = {
        f"codes{bits}": reference.pack(q, bits),
        "scale": np.random.default_rng(0).uniform(0.5, 2, rows).astype(np.float32),
        "mu": np.float32(mu),
        "group_scale": group_scale,
    }
    pairs = np.unique(q * 256 + np.repeat(group_scale, group_size, axis=1)[:, :cols])
    assert len(pairs) == 256 << bits
    assert np.array_equal(reference.unpack(fields[f"codes{bits}"], bits), q)
    return fields


@pytest.mark.parametrize(("group_size", "mu"), [(32, 2.5), (64, 0.0), (128, 65536.0)])
@pytest.mark.parametrize("codec", CODECS)
def test_every_code_and_group_scale(codec, group_size, mu):
    fields = every_code(codec, min(group_size, 64), mu)
    if group_size > 64:
        fields["group_scale"] = fields["group_scale"][:, ::2].copy()
    e = qins.EncodedArray.from_fields(codec, fields, group_size)
    assert e.shape == (256, 152)
    expected = reference.decode_packed(fields, codec, group_size)
    assert same_bits(on_every_isa(e.decode), expected)
    moved = qins.EncodedArray.from_fields(codec, {n: unaligned(np.asarray(f)) for n, f in fields.items()}, group_size)
    assert moved.fields[f"codes{BITS[codec]}"].ctypes.data % 2
    assert same_bits(on_every_isa(moved.decode), expected)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        assert same_bits(on_every_isa(lambda dtype=dtype: e.decode(dtype)), expected.astype(dtype))

    def block(row, col, rows, cols):
        out = np.empty((rows, cols), np.float32)
        e.decode_block(out, "float32", row, col)
        return out

    for row, col, rows, cols in ((0, 0, 1, 1), (3, 5, 2, 59), (250, 63, 6, 2), (9, 65, 3, 87), (0, 127, 4, 25)):
        part = on_every_isa(lambda at=(row, col, rows, cols): block(*at))
        assert same_bits(part, expected[row : row + rows, col : col + cols].copy())
    names, codes = field_names(codec, group_size), tensors(e)
    assert same_bits(decode_on_device(codec, group_size, codes, torch.float32).numpy(), expected)
    by_name = dict(zip(names, codes, strict=True))
    assert same_bits(decode_fields(codec, by_name, group_size, torch.float32).numpy(), expected)
    blocks = Blocks(codec, group_size, codes)
    for at, columns, tile in blocks.tiles(torch.float32, torch.empty(7 * 100)):
        assert same_bits(tile.numpy().copy(), expected[at, columns].copy())


@pytest.mark.parametrize("codec", CODECS)
def test_every_length(rng, codec):
    bits = BITS[codec]
    for cols in (*range(8, 201, 8), 1016, 1024, 1032, 4088, 4096, 4104):
        group_size = (32, 64, 128, 192, 8192)[cols // 8 % 5]
        w = rng.normal(0, 0.02, (3, cols)).astype(np.float32)
        w[1] = np.abs(w[1])
        w[2, ::3] = 0

        def encoded(w=w, group_size=group_size):
            e = qins.encode(w, codec, group_size=group_size, mu=1.5)
            return np.concatenate([f.reshape(-1).view(np.uint8) for f in (*e.fields.values(), e.decode())])

        e = qins.encode(unaligned(w), codec, group_size=group_size, mu=1.5)
        d = e.decode()
        same = np.concatenate([f.reshape(-1).view(np.uint8) for f in (*e.fields.values(), d)])
        assert np.array_equal(on_every_isa(encoded), same)
        q = reference.unpack(e.fields[f"codes{bits}"], bits)
        assert np.array_equal(reference.pack(q, bits), e.fields[f"codes{bits}"])
        s = reference.packed_scale(e.fields, group_size, w.shape)
        assert same_bits(d, reference.packed_values(1.5, bits)[q] * s)
        assert (q != reference.nearest_packed(w, s, 1.5, bits)).sum() <= 1  # a tie in float32
        assert not q[w == 0].any()


@pytest.mark.parametrize("codec", CODECS)
def test_the_sign_of_a_scale_is_that_of_the_largest_weights(isa, codec):
    """Codes reach the full magnitude of the scale only with the sign opposite to its own."""
    w = np.full((4, 64), 0.25, np.float32)
    w[:, 1::2] = 0
    w[1] *= -1
    w[2, 32:] *= -3
    w[3] = 0
    e = qins.encode(w, codec)
    np.testing.assert_allclose(e.decode(), w, rtol=2e-7, atol=0)
    assert np.array_equal(e.fields["group_scale"][:3] >= 128, [[1, 1], [0, 0], [1, 0]])
    assert e.fields["scale"][3] == 0
    assert not e.fields[f"codes{BITS[codec]}"][3].any()


@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_any_magnitude(codec, rng):
    """Rows from subnormal to those with the largest scale; also groups of zeros, of one weight, and of both."""
    w = rng.normal(0, 1, (24, 136)).astype(np.float32)
    w *= np.float32(10) ** rng.integers(-3, 1, (24, 136)).astype(np.float32)
    size = np.array([1e-45, 1e-42, 1e-38, 5e-32, 7.9e-31, 1e-30, 1e-8, 1, 1e8, 1e30, 1.3e30, 1e38], np.float32)
    with np.errstate(under="ignore"):
        w *= np.repeat(size, 2)[:, None] / np.abs(w).max(1, keepdims=True)
    w[::2, 32:64] = 0
    w[1::2, 65:96] = 0
    w[0, 0], w[-1, 0], w[-1, 1] = -1e-45, np.finfo(np.float32).max, -np.finfo(np.float32).max
    for group_size in (32, 64):
        for mu in (None, 0.0, 32.0):
            e = qins.encode(w, codec, group_size=group_size, mu=mu)
            d = e.decode()
            assert np.isfinite(d).all()
            assert (d[w == 0] == 0).all()
            assert same_bits(on_every_isa(lambda e=e: e.decode()), reference.decode_packed(e.fields, codec, group_size))
            s = reference.packed_scale(e.fields, group_size, w.shape)
            values = reference.packed_values(float(e.fields["mu"]), BITS[codec]).astype(np.float64) * s[..., None]
            least = np.abs(values - w[..., None].astype(np.float64)).min(-1)
            # the nearest, except for ties, and the rounding of subnormal numbers
            assert (np.abs(d.astype(np.float64) - w) <= least + 1e-6 * np.abs(s) + 2e-45).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 64), (5, 0), (0,), (2, 0, 8)])
def test_nothing_to_encode(isa, codec, shape):
    e = qins.encode(np.zeros(shape, np.float32), codec)
    assert e.decode().shape == shape
    assert qins.EncodedArray.from_fields(codec, e.fields).shape == shape


@pytest.mark.parametrize("codec", CODECS)
def test_mu_and_scales_are_searched(isa, rng, codec):
    w = rng.laplace(0, 0.02, (64, 256)).astype(np.float32)
    best = reference.snr_db(w, qins.encode(w, codec).decode())
    fixed = [reference.snr_db(w, qins.encode(w, codec, mu=mu).decode()) for mu in (0.0, 0.5, 2.0, 4.0, 8.0, 32.0)]
    assert best > max(fixed) - 0.1
    assert best > {"log6": 33.5, "log5": 27.5, "log4": 21}[codec]
    # every scale against all others of its group, with the same mu
    e = qins.encode(w[:2], codec)
    mu, bits = float(e.fields["mu"]), BITS[codec]
    every = np.float32(1) * np.concatenate([np.arange(1, 129), -np.arange(1, 129)]) / 128
    values = reference.packed_values(mu, bits).astype(np.float64)
    for row in range(2):
        s = e.fields["scale"][row].astype(np.float64) * every
        groups = w[row].reshape(-1, 32).astype(np.float64)
        errors = [(np.abs(groups[..., None] - values * x).min(-1) ** 2).sum(-1) for x in s]
        least = np.min(errors, axis=0).sum()
        assert np.square(e.decode()[row].astype(np.float64) - w[row]).sum() < least * 1.06


@pytest.mark.parametrize("codec", CODECS)
def test_outliers_of_activations(isa, rng, codec):
    """A few activations hold a row's energy, and their weights are small beside their neighbors."""
    w = rng.normal(0, 0.02, (67, 320)).astype(np.float32)
    columns = np.array([0, 63, 64, 129, 319])
    w[:, columns] *= 0.05
    e = qins.encode(w, codec, group_size=64 if codec == "log5" else 32)
    exact = e.decode().astype(np.float64)
    for rows in (1, 3, 8, 70):
        x = rng.normal(size=(rows, 320)).astype(np.float32)
        x[:, columns[: 1 + rows % 5]] *= 1e4
        expected = x.astype(np.float64) @ exact.T
        error = qins.matmul(x, e).astype(np.float64) - expected
        assert np.linalg.norm(error) <= 4e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("codec", CODECS)
def test_products_do_not_depend_on_threads_or_alignment(isa, rng, codec):
    for cols in (1032, 8):
        e = qins.encode(rng.normal(0, 0.02, (201, cols)).astype(np.float32), codec)
        moved = qins.EncodedArray.from_fields(codec, {n: unaligned(f) for n, f in e.fields.items()})
        for rows in (1, 7, 40, 130):
            for dtype in (np.float32, ml_dtypes.bfloat16):
                x = rng.normal(size=(rows, cols)).astype(dtype)
                results = []
                for threads in (1, 2, 5):
                    qins.set_num_threads(threads)
                    results.append(qins.matmul(x, e))
                assert same_bits(results[0], results[1])
                assert same_bits(results[0], results[2])
                assert same_bits(results[0], qins.matmul(x, moved))


def test_torch_tensors_are_encoded(rng):
    w = torch.from_numpy(rng.normal(0, 0.02, (6, 96)).astype(np.float32))
    for t in (w, w.bfloat16(), w[:, :48].T[:, :0], w[::2, 16:], w.half()):
        a, b = qins.encode(t, "log5"), qins.encode(t.float().numpy().copy(), "log5")
        assert all(np.array_equal(a.fields[n], b.fields[n]) for n in b.fields)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_fields(data):
    """Whatever the bytes are, every instruction set and torch decode them as the reference does."""
    codec = data.draw(st.sampled_from(CODECS))
    group_size = data.draw(st.sampled_from([32, 64, 128, 192]))
    rows, cols, bits = data.draw(st.integers(0, 4)), 8 * data.draw(st.integers(0, 30)), BITS[codec]
    scale = st.floats(0, 2.0**127, width=32)
    fields = {
        f"codes{bits}": data.draw(hnp.arrays(np.uint8, (rows, cols * bits // 8))),
        "scale": data.draw(hnp.arrays(np.float32, rows, elements=scale)),
        "mu": np.float32(data.draw(st.floats(0, 65536, width=32))),
        "group_scale": data.draw(hnp.arrays(np.uint8, (rows, -(-cols // group_size)))),
    }
    e = qins.EncodedArray.from_fields(codec, fields, group_size)
    expected = reference.decode_packed(fields, codec, group_size)
    with qins.use_isa(data.draw(st.sampled_from(qins.isas()))):
        decoded = e.decode()
    assert same_bits(decode_on_device(codec, group_size, tensors(e), torch.float32).numpy(), decoded)
    # levels are rounded from other logarithms than NumPy's
    np.testing.assert_allclose(decoded, expected, rtol=2e-7, atol=2e-45)
    assert np.array_equal(np.signbit(decoded), np.signbit(expected))


@settings(max_examples=100, deadline=None)
@given(
    w=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 12).map(lambda n: 8 * n)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    codec=st.sampled_from(CODECS),
    group_size=st.sampled_from([32, 64]),
)
def test_any_weights_get_the_nearest_codes(w, codec, group_size):
    e = qins.encode(w, codec, group_size=group_size)
    s = reference.packed_scale(e.fields, group_size, w.shape).astype(np.float64)
    values = reference.packed_values(float(e.fields["mu"]), BITS[codec]) * s[..., None]
    least = np.abs(values - w[..., None].astype(np.float64)).min(-1)
    assert (np.abs(e.decode().astype(np.float64) - w) <= least + 1e-6 * np.abs(s) + 2e-45).all()
