"""QINSCodec against an independent PyTorch implementation of the seed's formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from seed_golden import seed_decode, seed_encode

import qins


@pytest.fixture
def w():
    return torch.normal(0, 0.02, (1024, 768), generator=torch.Generator().manual_seed(42))


def test_codes_equal_the_seeds(isa, w):
    stored, sign, low, high = qins.QINSCodec.encode(w)
    theirs = seed_encode(w)
    assert (stored.dtype, sign.dtype, low.dtype, high.dtype) == tuple(t.dtype for t in theirs)
    assert (stored == theirs[0]).float().mean() >= 0.9999
    assert (stored.int() - theirs[0].int()).abs().max() <= 1
    assert torch.equal(sign, theirs[1])
    torch.testing.assert_close(low, theirs[2])
    torch.testing.assert_close(high, theirs[3])
    torch.testing.assert_close(qins.QINSCodec.decode(*theirs), seed_decode(*theirs), rtol=1e-5, atol=0)
    same = stored == theirs[0]
    ours, seeds = qins.QINSCodec.decode(stored, sign, low, high), seed_decode(*theirs)
    torch.testing.assert_close(ours[same], seeds[same], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "values",
    [[0.0, 0.0, -0.0], [0.3, -0.3], [1e-9, -1e-9, 0.0], [1.0, 1e-8, 2e-8], [0.0, 0.01, -5.0], [1.0], [3e38, 1e-38]],
)
def test_edges_as_the_seed_has_them(isa, values):
    w = torch.tensor([values])
    ours, theirs = qins.QINSCodec.encode(w), seed_encode(w)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(qins.QINSCodec.decode(*ours), seed_decode(*theirs), rtol=1e-5, atol=0)


def test_numpy_in_numpy_out(w):
    arrays = qins.QINSCodec.encode(w.numpy())
    assert all(isinstance(a, np.ndarray) for a in arrays)
    assert isinstance(qins.QINSCodec.decode(*arrays), np.ndarray)
    assert np.array_equal(qins.QINSCodec.decode(*arrays), qins.QINSCodec.decode(*qins.QINSCodec.encode(w)).numpy())


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)])
def test_shapes(shape):
    t = torch.randn(shape)
    parts = qins.QINSCodec.encode(t)
    assert parts[0].shape == parts[1].shape == t.shape
    assert qins.QINSCodec.decode(*parts).shape == t.shape


def test_python_floats_as_range(w):
    stored, sign, low, high = qins.QINSCodec.encode(w)
    assert torch.equal(
        qins.QINSCodec.decode(stored, sign, low.item(), high.item()), qins.QINSCodec.decode(stored, sign, low, high)
    )


def test_errors(w):
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        qins.QINSCodec.encode(torch.tensor([1.0, float("nan")]))
    with pytest.raises(TypeError, match="weights: expected"):
        qins.QINSCodec.encode(torch.tensor([1, 2]))
    stored, sign, low, high = qins.QINSCodec.encode(w)
    with pytest.raises(ValueError, match="sign: expected shape"):
        qins.QINSCodec.decode(stored, sign[1:], low, high)
    with pytest.raises(ValueError, match="stored: expected codes 1 to 255"):
        qins.QINSCodec.decode(stored * 0, sign, low, high)
