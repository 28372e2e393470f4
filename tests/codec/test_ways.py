"""Every matmul kernel, forced, on every instruction set, against float64; and the table that dispatches to them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import reference

import qins
from qins import _core

FORMATS = [
    ("golden", None), ("log9", None), ("rational", None), *(("log8", g) for g in (None, 32, 64, 128, 10)),
    ("log6", 32), ("log6", 128), ("log5", 64), ("log4", 32), ("log4", 192),
]  # fmt: skip


@pytest.fixture
def forced_way():
    yield _core.force_way
    _core.force_way(None)


def way(e, rows, dtype):
    mu = float(e.fields["mu"]) if "mu" in e.fields else 0.0
    return _core.way(e.codec, mu, e.group_size or 0, rows, dtype)


@pytest.mark.parametrize("name", _core.WAYS)
@pytest.mark.parametrize(("codec", "group_size"), FORMATS)
def test_every_way_gives_the_product(isa, rng, forced_way, name, codec, group_size):
    cols = 328 if codec in reference.BITS else 330
    w = rng.normal(0, 0.02, (70, cols)).astype(np.float32)
    e = qins.encode(w, codec, group_size=group_size)
    exact = e.decode().astype(np.float64)
    forced_way(name)
    for dtype, limit in ((np.float32, 2e-4), (ml_dtypes.bfloat16, 4e-3)):
        for rows in (1, 2, 7, 17, 50, 130):
            if way(e, rows, np.dtype(dtype).name) != name:
                continue  # this kernel does not support these codes or this instruction set
            x = rng.normal(size=(rows, cols)).astype(dtype)
            expected = x.astype(np.float64) @ exact.T
            error = qins.matmul(x, e).astype(np.float64) - expected
            assert np.sqrt(np.square(error).mean() / np.square(expected).mean()) < limit


@pytest.mark.parametrize(
    ("codec", "group_size", "cols"),
    [("log8", g, 20_040) for g in (None, 32, 64, 128, 192, 256)]
    + [("log4", g, cols) for g in (32, 64, 192) for cols in (16_936, 40_008)],
)
def test_long_rows(isa, rng, codec, group_size, cols):
    """Kernels take parts of columns, and list the scales of up to a thousand groups."""
    w = rng.normal(0, 0.02, (3, cols)).astype(np.float32)
    w *= np.repeat(rng.uniform(0.2, 1.0, -(-cols // 32)), 32)[:cols].astype(np.float32)
    e = qins.encode(w, codec, group_size=group_size)
    exact = e.decode().astype(np.float64)
    for rows in (1, 3):
        x = rng.normal(size=(rows, cols)).astype(np.float32)
        error = qins.matmul(x, e) - x.astype(np.float64) @ exact.T
        assert np.abs(error).max() < 2e-4 * np.linalg.norm(exact, axis=1).max() * 4


@pytest.mark.parametrize(
    ("codec", "group_size"), [("log8", g) for g in (None, 32, 64, 128)] + [("log4", 32), ("log6", 64)]
)
def test_the_largest_sums(isa, rng, forced_way, codec, group_size):
    """No sum of integers overflows: rows of activations that are the weights' own, and weights of one magnitude."""
    w = rng.normal(0, 0.02, (40, 328)).astype(np.float32)
    w[:4] = 0.02
    w[4:8] = rng.choice([-0.02, 0.02], (4, 328))
    e = qins.encode(w, codec, group_size=group_size)
    exact = e.decode().astype(np.float64)
    x = np.tile(exact, (4, 1)).astype(np.float32) * rng.choice([-1e6, 1e6], (160, 1)).astype(np.float32)
    for name in _core.WAYS:
        forced_way(name)
        for rows in (1, 8, 160):
            if way(e, rows, "float32") == name:
                error = np.abs(qins.matmul(x[:rows], e) - x[:rows].astype(np.float64) @ exact.T)
                assert np.all(error <= 4e-4 * np.linalg.norm(x[:rows], axis=1)[:, None] * np.linalg.norm(exact, axis=1))


@pytest.mark.parametrize(
    ("codec", "group_size"), [("golden", None), ("rational", None), ("log8", 64), ("log8", 10), ("log5", 32)]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_spoil_their_own_row_only(isa, rng, forced_way, codec, group_size, bad):
    e = qins.encode(rng.normal(0, 0.02, (40, 328)).astype(np.float32), codec, group_size=group_size)
    x = rng.normal(size=(160, 328)).astype(np.float32)
    expected = x @ e.decode().T
    x[7, 320] = bad
    for name in _core.WAYS:
        forced_way(name)
        for rows in (8, 160):
            if way(e, rows, "float32") == name:
                y = qins.matmul(x[:rows], e)
                assert not np.isfinite(y[7]).any()
                others = np.arange(rows) != 7
                np.testing.assert_allclose(y[others], expected[:rows][others], atol=2e-3)


# the table by (isa, codec, group size, dtype): first number of rows to kernel
@pytest.mark.parametrize(
    ("name", "codec", "group_size", "dtype", "expected"),
    [
        ("scalar", "log8", 0, "float32", {1: "WORDS", 9: "FLOAT_PANELS"}),
        ("scalar", "golden", 0, "float32", {1: "FACTORS", 9: "FLOAT_PANELS"}),
        ("scalar", "rational", 0, "bfloat16", {1: "FLOATS", 9: "FLOAT_PANELS"}),
        ("avx2", "log8", 128, "float32", {1: "WORDS", 65: "WORD_PANELS"}),
        ("avx2", "log9", 0, "float32", {1: "FACTORS", 25: "FLOAT_PANELS"}),
        ("avx2", "log8", 100, "float32", {1: "FLOATS", 9: "FLOAT_PANELS"}),
        ("neon", "log8", 64, "float32", {1: "WORDS", 33: "FLOAT_PANELS"}),
        ("avx512", "log8", 32, "bfloat16", {1: "WORDS", 41: "WORD_PANELS"}),
        ("avx512vnni", "log8", 0, "float32", {1: "BYTES", 2: "WORDS", 65: "WORD_PANELS"}),
        ("avx512vnni", "log8", 64, "float32", {1: "BYTES", 2: "WORDS", 41: "WORD_PANELS"}),
        ("avx512bf16", "log8", 64, "bfloat16", {1: "WORDS", 16: "HALF_PANELS"}),
        ("avx512bf16", "log8", 0, "float32", {1: "WORDS", 65: "WORD_PANELS"}),
        ("avx512bf16", "golden", 0, "bfloat16", {1: "FACTORS", 9: "HALF_PANELS"}),
        ("amx", "log8", 128, "float32", {1: "BYTES", 2: "TILES", 129: "PLANE_PANELS"}),
        ("amx", "log8", 64, "float32", {1: "BYTES", 2: "WORDS", 4: "TILES", 129: "PLANE_PANELS"}),
        ("amx", "log8", 0, "bfloat16", {1: "BYTES", 2: "TILES", 49: "HALF_PANELS"}),
        ("amx", "log8", 64, "bfloat16", {1: "BYTES", 2: "WORDS", 4: "TILES", 73: "HALF_PANELS"}),
        ("amx", "log8", 32, "float32", {1: "WORDS", 5: "TILES", 129: "PLANE_PANELS"}),
        ("amx", "log8", 32, "bfloat16", {1: "WORDS", 5: "TILES", 73: "HALF_PANELS"}),
        ("scalar", "log4", 32, "float32", {1: "WORDS", 9: "FLOAT_PANELS"}),
        ("avx2", "log5", 64, "float32", {1: "WORDS", 41: "WORD_PANELS"}),
        ("avx512vnni", "log6", 128, "float32", {1: "WORDS", 65: "WORD_PANELS"}),
        ("avx512bf16", "log4", 32, "bfloat16", {1: "WORDS", 16: "HALF_PANELS"}),
        ("amx", "log6", 32, "float32", {1: "WORDS", 7: "TILES", 129: "PLANE_PANELS"}),
        ("amx", "log5", 64, "bfloat16", {1: "WORDS", 4: "TILES", 73: "HALF_PANELS"}),
    ],
)
def test_choice(name, codec, group_size, dtype, expected):
    if name not in qins.isas():
        pytest.skip(f"NOT RUN: {name} does not run on this processor")
    with qins.use_isa(name):
        for rows in range(1, 600):
            from_rows = max(n for n in expected if n <= rows)
            assert _core.way(codec, 2.5, group_size, rows, dtype) == expected[from_rows], rows


def test_words_that_are_not_exact_enough_are_not_chosen():
    """AVX2's WORDS kernel multiplies two fixed-point factors, which are too imprecise for a small mu."""
    if "avx2" not in qins.isas():
        pytest.skip("NOT RUN: avx2 does not run on this processor")
    with qins.use_isa("avx2"):
        assert [_core.way("log8", mu, 0, 1, "float32") for mu in (0.25, 0.5)] == ["FLOATS", "WORDS"]


@pytest.mark.parametrize("codec", reference.BITS)
def test_words_of_packed_codes_are_exact_enough_for_any_mu(isa, rng, codec):
    e = qins.encode(rng.normal(0, 0.02, (70, 328)).astype(np.float32), codec, mu=0.0)
    assert way(e, 1, "float32") == "WORDS"
    x = rng.normal(size=(1, 328)).astype(np.float32)
    expected = x.astype(np.float64) @ e.decode().astype(np.float64).T
    error = qins.matmul(x, e) - expected
    assert np.sqrt(np.square(error).mean() / np.square(expected).mean()) < 1e-4


@pytest.mark.parametrize("codec", ["log8", *reference.BITS])
def test_what_encoders_choose_is_multiplied_in_words(isa, rng, codec):
    """Uniform weights get the smallest mu. Decoded to floats, they took AVX2 ten times as long."""
    e = qins.encode(rng.uniform(-0.02, 0.02, (70, 320)).astype(np.float32), codec, group_size=32)
    assert e.fields["mu"] == 0.5
    assert way(e, 1, "float32") == "WORDS"


def test_unknown_way():
    with pytest.raises(ValueError, match="way: expected one of _core.WAYS, got 'FAST'"):
        _core.force_way("FAST")
    assert _core.way("log8", 2.5, 0, 1, "float32") in _core.WAYS
