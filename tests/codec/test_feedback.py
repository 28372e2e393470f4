"""Error feedback against a plain float64 implementation of GPTQ, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import reference

import qins


def inputs(rng, tokens, cols):
    """Activations as in models: correlated, of different magnitudes, with one outlier channel."""
    x = rng.normal(size=(tokens, cols)) @ rng.normal(size=(cols, cols)) * np.exp(rng.normal(size=cols))
    x[:, 0] *= 30
    return x


def nearest_distance(target, scale, mu):
    """Distance from each target to the nearest value of a code."""
    f = reference.log8_levels(mu).astype(np.float64)
    r = np.abs(target) / scale
    return np.abs(r[..., None] - f).min(-1) * scale


@pytest.mark.parametrize("group_size", [None, 16, 64])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (16, 32), (17, 48), (40, 33)])
def test_codes_are_the_reference_algorithms(isa, rng, rows, cols, group_size):
    w = rng.normal(0, 0.02, (rows, cols)).astype(np.float32)
    x = inputs(rng, 4 * cols, cols)
    gram = x.T @ x
    e = qins.ErrorFeedback(gram, 0.01).encode(w, group_size=group_size)
    values = e.decode().astype(np.float64)
    np.testing.assert_allclose(values, reference.decode_log8(e.fields, group_size), rtol=2e-7)
    target = reference.feedback_targets(w, values, gram, 0.01)
    scale = reference.log8_scale(e.fields, group_size, w.shape).astype(np.float64)
    far = np.abs(target - values) - nearest_distance(target, scale, float(e.fields["mu"]))
    assert far.max() < 2e-5 * scale.max()  # nearest, except for ties
    sure = np.abs(target) > 1e-5 * scale
    np.testing.assert_array_equal((values < 0)[sure & (values != 0)], (target < 0)[sure & (values != 0)])


def test_every_instruction_set_and_number_of_threads_agrees(rng):
    w = rng.normal(0, 0.02, (100, 96)).astype(np.float32)
    x = inputs(rng, 500, 96)
    feedback = qins.ErrorFeedback(x.T @ x)
    first = None
    for isa in qins.isas():
        for threads in (1, 3):
            qins.set_num_threads(threads)
            with qins.use_isa(isa):
                e = feedback.encode(w, group_size=32)
            first = first or e
            assert all(np.array_equal(e.fields[n], first.fields[n]) for n in first.fields)


def test_outputs_are_closer(isa, rng):
    w, x = rng.normal(0, 0.02, (64, 128)).astype(np.float32), inputs(rng, 2000, 128)
    gram = x[:1000].T @ x[:1000]

    def error(e):
        return float((((e.decode() - w).astype(np.float64) @ x[1000:].T) ** 2).sum())  # on other tokens

    nearest = error(qins.encode(w, group_size=128))
    weighed = error(qins.encode(w, group_size=128, importance=gram.diagonal()))
    fed = error(qins.ErrorFeedback(gram, 0.01).encode(w, group_size=128))
    assert fed < 0.5 * weighed < 0.5 * nearest


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_dtypes(rng, dtype):
    w = rng.normal(0, 0.02, (8, 32)).astype(np.float32)
    held = w.astype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    feedback = qins.ErrorFeedback(np.eye(32))
    a, b = feedback.encode(held), feedback.encode(held.astype(np.float32))
    np.testing.assert_array_equal(a.fields["codes"], b.fields["codes"])


def test_uncorrelated_inputs_give_the_nearest_codes(rng):
    w = rng.normal(0, 0.02, (20, 32)).astype(np.float32)
    a, b = qins.ErrorFeedback(np.eye(32)).encode(w), qins.encode(w)
    for name in b.fields:
        np.testing.assert_array_equal(a.fields[name], b.fields[name])


def test_hard_weights(isa):
    w = np.zeros((18, 24), np.float32)
    w[1], w[2, 3], w[3], w[4, 5] = 1e-42, 1e30, -3.0, 1e-30
    gram = np.full((24, 24), 0.9) + 0.1 * np.eye(24)
    values = qins.ErrorFeedback(gram).encode(w, group_size=8).decode()
    assert np.isfinite(values).all()
    assert not values[0].any()
    assert abs(values[2, 3] / 1e30 - 1) < 0.02
    np.testing.assert_allclose(values[3], -3.0, rtol=0.02)


def test_no_inputs_and_no_weights():
    w = np.ones((4, 6), np.float32)
    np.testing.assert_array_equal(
        qins.ErrorFeedback(np.zeros((6, 6))).encode(w).fields["codes"], qins.encode(w).fields["codes"]
    )
    assert qins.ErrorFeedback(np.zeros((0, 0))).encode(np.zeros((3, 0), np.float32)).shape == (3, 0)
    assert qins.ErrorFeedback(np.eye(5)).encode(np.zeros((0, 5), np.float32)).shape == (0, 5)


def test_importance(isa, rng):
    w = rng.normal(0, 0.02, (64, 256)).astype(np.float32)
    importance = np.exp(3 * rng.normal(size=256))
    plain, weighed = (qins.encode(w, group_size=64, importance=i) for i in (None, importance))

    def error(e):
        return float((importance * (e.decode().astype(np.float64) - w) ** 2).sum())

    assert error(weighed) < error(plain)
    same = qins.encode(w, group_size=64, importance=np.full(256, 7.0))
    assert all(np.array_equal(same.fields[n], plain.fields[n]) for n in plain.fields)
    # only ratios matter, at any magnitude
    again = qins.encode(w, group_size=64, importance=importance * 1e200)
    assert np.array_equal(again.fields["codes"], weighed.fields["codes"])


def test_errors(rng):
    w = rng.normal(size=(4, 6)).astype(np.float32)
    with pytest.raises(ValueError, match=r"gram: expected a square matrix, got shape \(6, 5\)"):
        qins.ErrorFeedback(np.zeros((6, 5)))
    with pytest.raises(ValueError, match="gram: expected finite numbers"):
        qins.ErrorFeedback(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="gram: expected a diagonal that is not negative"):
        qins.ErrorFeedback(-np.eye(3))
    with pytest.raises(ValueError, match="gram: expected a symmetric matrix"):
        qins.ErrorFeedback(np.triu(np.ones((3, 3))))
    with pytest.raises(ValueError, match="gram: singular with a damping of 0"):
        qins.ErrorFeedback(np.ones((3, 3)), damping=0.0)
    with pytest.raises(ValueError, match="damping: expected a number >= 0, got -1"):
        qins.ErrorFeedback(np.eye(3), damping=-1)
    feedback = qins.ErrorFeedback(np.eye(6))
    with pytest.raises(ValueError, match=r"weights: expected shape \(N, 6\), got \(4, 5\)"):
        feedback.encode(w[:, :5])
    with pytest.raises(ValueError, match="1 NaN or infinite, the first at flat index 8"):
        bad = w.copy()
        bad[1, 2] = np.inf
        feedback.encode(bad)
    with pytest.raises(ValueError, match=r"importance: expected shape \(6,\), got \(5,\)"):
        qins.encode(w, importance=np.ones(5))
    with pytest.raises(ValueError, match="importance: expected finite numbers that are not negative"):
        qins.encode(w, importance=[1, 2, 3, 4, 5, -1])
    with pytest.raises(ValueError, match="importance: expected None for codec 'golden'"):
        qins.encode(w, "golden", importance=np.ones(6))
