"""encode, decode, matmul and EncodedArray on NumPy arrays."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qins

ml_dtypes = pytest.importorskip("ml_dtypes")

CODECS = [
    ("golden", None), ("log9", None), ("log8", None), ("log8", 128), ("log8", 32), ("log8", 7), ("rational", None),
    ("log6", 64), ("log5", 192), ("log4", 32),
]  # fmt: skip
LEAST_SNR = {"log6": 30, "log5": 24, "log4": 19}  # in dB; 35 for the others
SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (3, 7), (17, 33), (2, 4099), (300, 1), (7,), (), (2, 3, 65), (2, 3, 72)]


def weights(rng, shape, dtype=np.float32):
    return rng.normal(0, 0.02, shape).astype(dtype)


def columns(codec, cols):
    """Return the largest number of columns, at most `cols`, that the codec can have."""
    return cols // 8 * 8 if codec in reference.BITS else cols


@pytest.mark.parametrize(("codec", "group"), CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(isa, rng, codec, group, shape):
    w = weights(rng, shape)
    if codec in reference.BITS and (not shape or shape[-1] % 8):
        cols = shape[-1] if shape else 1
        with pytest.raises(ValueError, match=f"weights: expected a multiple of 8 input .*'{codec}', got {cols}$"):
            qins.encode(w, codec, group_size=group)
        return
    e = qins.encode(w, codec, group_size=group)
    assert e.shape == shape
    assert (e.codec, e.group_size) == (codec, group)
    d = e.decode()
    assert d.shape == shape
    assert d.dtype == np.float32
    if codec in reference.BITS:
        assert (d * w >= 0).all()
    else:
        assert np.array_equal(np.signbit(d), np.signbit(w))
    assert e.nbytes == sum(f.nbytes for f in e.fields.values())
    if w.size > 100:
        assert reference.snr_db(w, d) > LEAST_SNR.get(codec, 35)


@pytest.mark.parametrize("group", [None, 1, 7, 32, 64, 128, 1000])
@pytest.mark.parametrize("mu", [None, 0.0, 2.5, 255.0])
def test_log8_against_reference(isa, rng, group, mu):
    w = weights(rng, (40, 300))
    w[3] *= 100
    w[5, ::7] = 0
    w[6] = 0
    e = qins.encode(w, "log8", group_size=group, mu=mu)
    f = e.fields
    assert np.array_equal(e.decode(), reference.decode_log8(f, group))
    scale = reference.log8_scale(f, group, w.shape)
    expected = reference.nearest_log8(w, scale, float(f["mu"]))
    # r = |w|/S is a float32, so it may fall on the other side of a tie
    assert np.mean(f["codes"] != expected) < 1e-4
    assert np.abs(f["codes"].astype(int) - expected).max() <= 1
    assert (e.decode()[w == 0] == 0).all()
    assert f["scale"][6] == 0
    assert not f["codes"][6].any()
    assert (f["scale"] <= np.abs(w).max(1) * (1.0 if group is None else 256 / 240 + 1e-6)).all()


def test_log8_keeps_minus_zero(isa):
    d = qins.encode(np.array([[-0.0, 0.0, 1.0, -1e-30]], np.float32)).decode()
    assert np.array_equal(np.signbit(d), [[True, False, False, True]])
    assert np.array_equal(np.abs(d), [[0, 0, 1, 0]])


@pytest.mark.parametrize("group", [1, 32, 64, 100])
def test_rows_of_one_magnitude(isa, rng, group):
    """Ternary weights, say, whose value is within a unit in the last place."""
    magnitude = rng.uniform(1e-6, 1e6, (50, 1)).astype(np.float32)
    w = magnitude * rng.integers(-1, 2, (50, 200)).astype(np.float32)
    d = qins.encode(w, group_size=group).decode()
    np.testing.assert_allclose(d, w, rtol=2e-7, atol=0)


@pytest.mark.parametrize("codec", ["golden", "log9"])
def test_golden_against_reference(isa, rng, codec):
    w = weights(rng, (64, 301))
    w[0, :5] = [0, -0.0, 1e-9, -9.99e-9, 1e-8]
    e = qins.encode(w, codec)
    r = reference.encode_golden(w)
    assert np.array_equal(e.fields["stored"], r["stored"])
    assert float(e.fields["log_min"]) == r["log_min"]
    assert float(e.fields["log_max"]) == r["log_max"]
    if codec == "golden":
        assert np.array_equal(e.fields["sign"], r["sign"])
    else:
        bits = np.unpackbits(e.fields["sign_bits"], axis=1, bitorder="little")
        assert np.array_equal(bits[:, :301], r["sign"] < 0)
        assert not bits[:, 301:].any()
    np.testing.assert_allclose(e.decode(), reference.decode_golden(r), rtol=1e-6)


def test_log9_decodes_to_goldens_floats(isa, rng):
    for shape in ((64, 301), (5, 4097), (9,)):
        w = weights(rng, shape)
        assert np.array_equal(qins.encode(w, "log9").decode(), qins.encode(w, "golden").decode())


def test_golden_edge_cases(isa):
    zeros = qins.encode(np.zeros((2, 3), np.float32), "golden")
    assert (zeros.fields["stored"] == 128).all()
    assert (zeros.fields["sign"] == 1).all()
    assert zeros.scalars == (-10.0, 0.0)
    one = qins.encode(np.array([[0.5, -0.5, 0.0]], np.float32), "golden")
    assert (one.fields["stored"] == 128).all()
    assert one.scalars[0] == one.scalars[1] == np.float32(np.log(0.5))
    np.testing.assert_allclose(one.decode(), [[0.5, -0.5, 0.5]], rtol=1e-6)
    ends = qins.encode(np.array([[1e-3, 1.0, -0.0]], np.float32), "golden")
    assert list(ends.fields["stored"][0]) == [255, 1, 255]
    assert ends.decode()[0, 2] == ends.decode()[0, 0] > 0  # zero decodes to the smallest magnitude


@pytest.mark.parametrize(("codec", "group"), CODECS)
def test_instruction_sets_and_threads_agree(rng, codec, group):
    w = weights(rng, (129, columns(codec, 1030)))
    w[7] *= 1e30
    w[8] *= 1e-38
    seen = set()
    for name in qins.isas():
        for threads in (1, 2, 5):
            qins.set_num_threads(threads)
            with qins.use_isa(name):
                e = qins.encode(w, codec, group_size=group)
                seen.add((*(f.tobytes() for f in e.fields.values()), e.decode().tobytes()))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("codec", "group"), CODECS)
def test_dtypes(isa, rng, codec, group, dtype):
    w = weights(rng, (33, columns(codec, 257))).astype(dtype)
    e = qins.encode(w, codec, group_size=group)
    same = qins.encode(w.astype(np.float32), codec, group_size=group)
    for name, f in same.fields.items():
        assert np.array_equal(f, e.fields[name])
    assert np.array_equal(e.decode(dtype), same.decode().astype(dtype))
    assert e.decode(dtype).dtype == dtype


def test_float16_subnormals_and_overflow(isa):
    w = np.array([[70000.0, 65520.0, 65519.0, 6e-8, 3e-8, 2.9e-8, 6.1e-5]], np.float32)
    e = qins.encode(w, "golden")
    with np.errstate(over="ignore"):
        assert np.array_equal(e.decode(np.float16), e.decode().astype(np.float16))


@pytest.mark.parametrize(("codec", "group"), CODECS)
def test_strides(isa, rng, codec, group):
    base = weights(rng, (60, 90))
    big = np.zeros(60 * 90 * 4 + 1, np.uint8)
    unaligned = big[1:].view(np.float32).reshape(60, 90)
    unaligned[...] = base
    for view in (base.T, base[::2, 3:], base[:, ::-3], np.asfortranarray(base), unaligned, base.astype(">f4")):
        view = view[:, : columns(codec, view.shape[1])]
        e = qins.encode(view, codec, group_size=group)
        same = qins.encode(np.ascontiguousarray(view).astype(np.float32), codec, group_size=group)
        for name, f in same.fields.items():
            assert np.array_equal(f, e.fields[name])


def test_decode_out(isa, rng):
    e = qins.encode(weights(rng, (6, 40)), group_size=16)
    room = np.full((6, 60), 7, np.float32)
    assert e.decode(out=room[:, 10:50]) is not None
    assert np.array_equal(room[:, 10:50], e.decode())
    assert (room[:, :10] == 7).all()
    assert (room[:, 50:] == 7).all()


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        (np.empty((6, 41), np.float32), ValueError, r"out: expected shape \(6, 40\).*got shape \(6, 41\)"),
        (np.empty((6, 40), np.float64), ValueError, "out: expected .*float32.*got .*float64"),
        (np.empty((6, 80), np.float32)[:, ::2], ValueError, "out: expected .*contiguous"),
        (np.empty((40, 6), np.float32).T, ValueError, "out: expected .*contiguous"),
        ([0.0], TypeError, "out: expected a NumPy array, got list"),
    ],
)
def test_decode_wrong_out(rng, out, error, says):
    with pytest.raises(error, match=says):
        qins.encode(weights(rng, (6, 40))).decode(out=out)


def test_decode_read_only_or_overlapping_out(rng):
    e = qins.encode(weights(rng, (8, 8)))
    fixed = np.empty((8, 8), np.float32)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected a writable.*got read-only"):
        e.decode(out=fixed)
    room = np.zeros(8 * 8 * 4, np.uint8)
    room[:64] = e.fields["codes"].reshape(-1)
    inside = qins.EncodedArray.from_fields("log8", {**e.fields, "codes": room[:64].reshape(8, 8)})
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        inside.decode(out=room.view(np.float32).reshape(8, 8))


@pytest.mark.parametrize("codec", ["golden", "log9", "log8", "log6", "log5", "log4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite(isa, rng, codec, bad):
    w = weights(rng, (50, 72))
    w[3, 4] = w[40, 2] = bad
    with pytest.raises(ValueError, match=r"weights: .*2 NaN or infinite.*flat index 220 \(row 3, column 4\)"):
        qins.encode(w, codec)
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        qins.encode(np.array([[1e300] + [1.0] * 7]), codec)  # infinite in float32


@pytest.mark.parametrize("w", [np.zeros(3, np.int32), np.zeros(3, complex), np.array(["a"]), np.zeros(3, bool)])
def test_wrong_dtype(w):
    with pytest.raises(TypeError, match="weights: expected float32"):
        qins.encode(w)


def test_wrong_arguments():
    w = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="codec: expected one of golden, .*rational, log6, log5, log4, got 'log7'"):
        qins.encode(w, "log7")
    with pytest.raises(ValueError, match="group_size: expected None for codec 'golden'"):
        qins.encode(w, "golden", group_size=32)
    for size in (0, -1, 2.5, True, "64"):
        with pytest.raises(ValueError, match="group_size: expected a positive integer"):
            qins.encode(w, group_size=size)
    for size in (8, 48, 96):
        with pytest.raises(
            ValueError, match=f"group_size: expected 32 or a multiple of 64 for codec 'log5', got {size}"
        ):
            qins.encode(w, "log5", group_size=size)
    for mu in (-1.0, float("nan"), 1e9):
        with pytest.raises(ValueError, match="mu: expected 0 to 65536"):
            qins.encode(w, mu=mu)
    with pytest.raises(ValueError, match="mu: expected None for codec 'log9'"):
        qins.encode(w, "log9", mu=1.0)
    with pytest.raises(TypeError, match="dtype: expected float32"):
        qins.encode(w).decode(np.int32)


def test_from_fields_round_trip(isa, rng):
    for codec, group in CODECS:
        e = qins.encode(weights(rng, (9, columns(codec, 77))), codec, group_size=group)
        frozen = {n: f.copy() for n, f in e.fields.items()}
        for f in frozen.values():
            f.flags.writeable = False
        again = qins.EncodedArray.from_fields(codec, frozen, group)
        assert np.array_equal(again.decode(), e.decode())
        assert all(np.shares_memory(again.fields[n], f) for n, f in frozen.items() if f.ndim)


BAD_FIELDS = [
    ("golden", "stored", lambda f: f * 0, "stored: expected codes 1 to 255, got 0 at flat index 0"),
    ("golden", "sign", lambda f: f * 0, "sign: expected -1 or"),
    ("golden", "sign", lambda f: f[:, 1:], r"sign: expected shape \(4, 12\)"),
    ("golden", "sign", lambda f: f.astype(np.int16), "sign: expected dtype int8, got int16"),
    ("golden", "log_max", lambda f: np.float32(np.inf), "log_min, log_max: expected finite"),
    ("golden", "log_max", lambda f: np.float32(89.0), "log_min, log_max"),
    ("golden", "log_min", lambda f: np.float32(np.nan), "log_min, log_max"),
    ("golden", "log_min", lambda f: np.float32(50), "log_min, log_max: expected .*ascending"),
    ("golden", "log_min", lambda f: np.zeros(2, np.float32), "log_min: expected one number"),
    ("log9", "sign_bits", lambda f: f[:, :1], r"sign_bits: expected shape \(4, 2\)"),
    ("log9", "sign_bits", lambda f: f | 0x80, "sign_bits: expected zeros in the unused bits"),
    ("log8", "codes", lambda f: f.astype(np.int8), "codes: expected dtype uint8, got int8"),
    ("log8", "scale", lambda f: -f, "scale: expected finite numbers >= 0"),
    ("log8", "scale", lambda f: f * np.nan, "scale: expected finite"),
    ("log8", "scale", lambda f: f[1:], r"scale: expected shape \(4,\)"),
    ("log8", "mu", lambda f: np.float32(-1), "mu: expected 0 to"),
    ("log8", "mu", lambda f: np.float32(np.nan), "mu: expected 0 to"),
    ("log8", "mu", lambda f: None, "mu: expected one number"),
    ("log6", "codes6", lambda f: f[:, 1:], "codes6: expected rows of a multiple of 6 bytes for log6, got 5"),
    ("log6", "codes6", lambda f: f[0, 0], r"codes6: expected at least one dimension for log6, got shape \(\)"),
    ("log5", "codes5", lambda f: f.astype(np.int8), "codes5: expected dtype uint8, got int8"),
    ("log5", "codes5", lambda f: np.tile(f, 9), r"group_scale: expected shape \(4, 3\) .* \(4, 72\), got \(4, 1\)"),
    ("log4", "group_scale", lambda f: f[:, :0], r"group_scale: expected shape \(4, 1\)"),
    ("log4", "group_scale", lambda f: f.astype(np.int16), "group_scale: expected dtype uint8, got int16"),
    ("log4", "scale", lambda f: -f, "scale: expected finite numbers >= 0"),
    ("log4", "mu", lambda f: np.float32(1e9), "mu: expected 0 to"),
]


@pytest.mark.parametrize(("codec", "name", "spoil", "says"), BAD_FIELDS)
def test_from_fields_malformed(rng, codec, name, spoil, says):
    e = qins.encode(weights(rng, (4, columns(codec, 12))), codec)
    with pytest.raises((ValueError, TypeError), match=says):
        qins.EncodedArray.from_fields(codec, {**e.fields, name: spoil(e.fields[name])})


def test_from_fields_wrong_names(rng):
    f = qins.encode(weights(rng, (4, 12))).fields
    with pytest.raises(ValueError, match=r"fields: expected \['codes', 'mu', 'scale'\].*got \['codes', 'scale'\]"):
        qins.EncodedArray.from_fields("log8", {n: f[n] for n in ("codes", "scale")})
    with pytest.raises(ValueError, match="fields: expected .*group_scale"):
        qins.EncodedArray.from_fields("log8", f, 4)
    f = qins.encode(weights(rng, (4, 16)), "log6").fields
    for missing in ("group_scale", "codes6"):
        with pytest.raises(ValueError, match=r"fields: expected \['codes6', 'group_scale', 'mu', 'scale'\] for log6"):
            qins.EncodedArray.from_fields("log6", {n: f[n] for n in f if n != missing})
    with pytest.raises(ValueError, match="group_size: expected 32 or a multiple of 64 for codec 'log6', got 16"):
        qins.EncodedArray.from_fields("log6", f, 16)
    with pytest.raises(ValueError, match=r"fields: expected \['codes5', .* got \['codes6'"):
        qins.EncodedArray.from_fields("log5", f)


@pytest.mark.parametrize(("codec", "group"), CODECS)
@pytest.mark.parametrize("shape", [(576,), (0, 576), (1, 576), (3, 2, 576), (40, 576)])
def test_matmul(isa, rng, codec, group, shape):
    e = qins.encode(weights(rng, (129, 576)), codec, group_size=group)
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        x = rng.normal(size=shape).astype(dtype)
        y = qins.matmul(x, e)
        exact = x.astype(np.float64) @ e.decode().astype(np.float64).T
        assert y.dtype == dtype
        assert y.shape == exact.shape
        error = y.astype(np.float64) - exact
        limit = {2: 8e-3 if dtype is not np.float16 else 1e-3}.get(np.dtype(dtype).itemsize, 2e-4)
        assert np.sqrt((error**2).sum()) <= limit * np.sqrt((exact**2).sum())


@pytest.mark.parametrize(("codec", "group"), CODECS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 64), (5, 0)])
def test_matmul_without_weights(isa, codec, group, shape):
    e = qins.encode(np.zeros(shape, np.float32), codec, group_size=group)
    for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
        for lead in ((), (0,), (1,), (2, 20)):
            y = qins.matmul(np.ones((*lead, shape[1]), dtype), e, out=np.full((*lead, shape[0]), 7, dtype))
            assert y.shape == (*lead, shape[0])
            assert not y.any()


def test_matmul_errors(rng):
    e = qins.encode(weights(rng, (5, 8)))
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 8\), got \(2, 7\)"):
        qins.matmul(np.zeros((2, 7), np.float32), e)
    with pytest.raises(TypeError, match="expected float32"):
        qins.matmul(np.zeros((2, 8), int), e)
    with pytest.raises(ValueError, match="e: expected codes of a matrix"):
        qins.matmul(np.zeros(8, np.float32), qins.encode(np.zeros(8, np.float32)))
    with pytest.raises(ValueError, match="out: expected shape"):
        qins.matmul(np.zeros((2, 8), np.float32), e, out=np.zeros((2, 4), np.float32))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    w=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40), elements=finite),
    codec=st.sampled_from(CODECS),
)
def test_any_weights(isa, w, codec):
    w = w[:, : columns(codec[0], w.shape[1])]
    e = qins.encode(w, codec[0], group_size=codec[1])
    d = e.decode()
    assert np.isfinite(d).all()
    checked = qins.EncodedArray.from_fields(codec[0], e.fields, codec[1])
    assert np.array_equal(checked.decode(), d)
    if codec[0] == "log8":
        assert np.array_equal(np.signbit(d), np.signbit(w))
        assert (d[w == 0] == 0).all()
        step = np.diff(reference.log8_levels(float(e.fields["mu"]))).max()
        beyond = 1.0 if codec[1] is None else 1.0 + step  # no further than the next level
        assert (np.abs(d) <= np.abs(w).astype(np.float64).max(1, initial=0)[:, None] * beyond).all()
        if codec[1] is None:
            scale = e.fields["scale"][:, None].astype(np.float64)
            inside = np.abs(w) <= scale
            # half a step, plus the rounding of subnormal products
            assert (np.abs(w - d.astype(np.float64)) <= scale * step * 0.5001 + 2e-45)[inside].all()
    elif codec[0] in reference.BITS:
        assert (d[w == 0] == 0).all()
        assert (np.abs(d) <= np.abs(w).max(1, initial=0)[:, None].astype(np.float64) * 1.07 + 2e-45).all()
    elif codec[0] == "rational":
        assert (np.abs(d) <= np.abs(w).max(initial=0) * np.float64(1.001) + 1e-6).all()
    else:
        r = reference.encode_golden(w)
        assert np.array_equal(e.fields["stored"], r["stored"])


@pytest.mark.slow
def test_more_than_2_to_31_elements():
    n = (1 << 31) + 4096 + 5
    w = np.zeros((1, n), np.float16)
    w[0, -3:] = [0.25, -0.5, 1.0]
    for codec in ("log8", "log9"):
        e = qins.encode(w, codec)
        out = np.empty((1, 8), np.float32)
        e.decode_block(out, "float32", 0, n - 8)
        np.testing.assert_allclose(out[0, -3:], [0.25, -0.5, 1.0], rtol=0.03)
        del e


def test_repr(rng):
    assert "log8" in repr(qins.encode(weights(rng, (2, 2))))


@pytest.mark.parametrize("group", [(1 << 30) + 64, 1 << 62])
def test_a_group_size_that_would_overflow(group):
    """Kernels multiply group sizes: with tiles, 2**62 was a division by zero."""
    e = qins.encode(np.ones((16, 128), np.float32), group_size=128)
    with pytest.raises(ValueError, match="group_size: expected at most 1073741824"):
        qins.EncodedArray.from_fields("log8", e.fields, group)
    x, y = np.ones((4, 128), np.float32), np.empty((4, 16), np.float32)
    with pytest.raises(ValueError, match="group_size: expected at most 1073741824"):
        qins._core.linear("log8", e.arrays, e.scalars, 16, 128, group, x, "float32", y, 1)
