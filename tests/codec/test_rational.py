"""The seed's rational codec."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import reference
import torch

import qins
from qins import rational

pytestmark = pytest.mark.filterwarnings("ignore:.*rational codec is deprecated:DeprecationWarning")


def weights(shape=(64, 300), scale=0.02, seed=0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


@pytest.mark.parametrize("alpha", [0.25, 1.0, 8.0])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 4099])
def test_formula(isa, alpha, n):
    w = weights((n,), 1.0)
    z = rational.qins_encode(w, alpha)
    sign = np.where(w < 0, -1.0, 1.0)
    np.testing.assert_allclose(z, sign / (1 + alpha * np.abs(w.astype(np.float64))), rtol=2e-7)
    assert z.dtype == np.float32
    back = rational.qins_decode(z, alpha)
    np.testing.assert_allclose(back, w, rtol=1e-5, atol=2e-7 / alpha)


def test_zero_is_positive(isa):
    z = rational.qins_encode(np.array([0.0, -0.0], np.float32))
    assert (z == 1).all()
    assert (rational.qins_decode(z) == 0).all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.0])
def test_codes_against_reference(isa, alpha, scale):
    w = weights((40, 301), scale)
    e = qins.encode(w, "rational", alpha=alpha)
    f = {n: v if n == "w_encoded" else float(v) for n, v in e.fields.items()}
    z = 1 / (1 + alpha * np.abs(w.astype(np.float64)))
    assert f["alpha"] == alpha
    np.testing.assert_allclose([f["z_min"], f["z_max"]], [z.min(), z.max()], rtol=1e-7)
    expected = reference.encode_rational(w, alpha, f["z_min"], f["z_max"])
    assert np.mean(f["w_encoded"] != expected) < 1e-3
    assert np.abs((f["w_encoded"] & 127).astype(int) - (expected & 127)).max() <= 1
    exact = reference.decode_rational(f["w_encoded"], alpha, f["z_min"], f["z_max"])
    np.testing.assert_allclose(e.decode(), exact, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_quality_of_bytes(make):
    w = weights((512, 512))
    codes = rational.qins_encode(make(w), 1.0, quantize=True)
    assert str(codes.dtype).endswith("uint8")
    assert tuple(codes.shape) == w.shape
    assert codes.nbytes == w.size
    d = rational.qins_decode(codes, 1.0, is_quantized=True)
    assert type(d) is type(make(w))
    assert reference.snr_db(w, np.asarray(d)) > 35


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_codes_keep_their_range(make):
    w = weights()
    codes = rational.qins_encode(make(w), 1.0, quantize=True)
    expected = np.asarray(rational.qins_decode(codes, 1.0, True))
    buffer = io.BytesIO()
    if isinstance(codes, torch.Tensor):
        torch.save(codes, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=False)
        assert type(codes.float()) is torch.Tensor
        clones = [codes.clone(), codes.detach(), codes.contiguous(), saved]
    else:
        clones = [codes.copy(), codes[:]]
    for c in (*clones, copy.deepcopy(codes), copy.copy(codes), pickle.loads(pickle.dumps(codes))):
        assert np.array_equal(np.asarray(rational.qins_decode(c, 1.0, True)), expected)
    part = rational.qins_decode(codes[3:5, ::2], 1.0, True)
    assert np.array_equal(np.asarray(part), expected[3:5, ::2])


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_the_seeds_own_codes_stay_readable(make):
    old = np.arange(256, dtype=np.uint8)
    z = old / 255 * 2 - 1
    d = np.asarray(rational.qins_decode(make(old), 2.0, is_quantized=True))
    expected = np.sign(z) * (1 - np.abs(z)) / (2.0 * np.abs(z))
    np.testing.assert_allclose(d, expected, rtol=2e-4, atol=1e-6)


def test_errors():
    w = weights((4, 4))
    w[1, 2] = np.nan
    for quantize in (False, True):
        with pytest.raises(ValueError, match="1 NaN or infinite, the first at flat index 6"):
            rational.qins_encode(w, quantize=quantize)
    for alpha in (0, -1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="alpha"):
            rational.qins_encode(np.zeros(3, np.float32), alpha)
    with pytest.raises(TypeError, match="floating-point"):
        rational.qins_encode(np.zeros(3, np.int32))
    with pytest.raises(TypeError, match="uint8"):
        rational.qins_decode(np.zeros(3, np.float32), is_quantized=True)
    with pytest.raises(TypeError, match="floating-point z"):
        rational.qins_decode(np.zeros(3, np.uint8))
    for z in (0.0, 1.5, np.nan):
        with pytest.raises(ValueError, match="0 < "):
            rational.qins_decode(np.array([0.5, z], np.float32))
    with pytest.raises(ValueError, match="alpha: expected None"):
        qins.encode(w, "log8", alpha=1.0)


def test_extreme_weights(isa):
    w = np.array([[1e38, -1e30, 1.0, 1e-38, 0.0, -1e-45]], np.float32)
    for alpha in (1e-6, 1.0, 1e6):
        d = qins.encode(w, "rational", alpha=alpha).decode()
        assert np.isfinite(d).all()
        assert np.array_equal(d < 0, [[False, True, False, False, False, False]]) or (d[w < 0] <= 0).all()
    assert (qins.encode(np.zeros((2, 3), np.float32), "rational").decode() == 0).all()
