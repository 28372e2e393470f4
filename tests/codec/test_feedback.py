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


def nearest_distance(target, scale, codec, mu):
    """Distance from each target to the nearest value of a code."""
    if codec == "log8":
        levels = reference.log8_levels(mu)
        values = np.concatenate([levels, -levels])
    else:
        values = reference.packed_values(mu, reference.BITS[codec])
    return np.abs(target[..., None] - values.astype(np.float64) * scale[..., None]).min(-1)


@pytest.mark.parametrize(
    ("codec", "group_size", "sizes"),
    [
        *(("log8", group, [(1, 1), (3, 5), (16, 32), (17, 48), (40, 33)]) for group in (None, 16, 64)),
        ("log6", 32, [(1, 8), (17, 72)]), ("log5", 64, [(16, 64), (3, 136)]), ("log4", 32, [(40, 32), (5, 104)]),
    ],
)  # fmt: skip
def test_codes_are_the_reference_algorithms(isa, rng, codec, group_size, sizes):
    for rows, cols in sizes:
        w = rng.normal(0, 0.02, (rows, cols)).astype(np.float32)
        x = inputs(rng, 4 * cols, cols)
        gram = x.T @ x
        e = qins.ErrorFeedback(gram, 0.01).encode(w, codec, group_size=group_size)
        values = e.decode().astype(np.float64)
        if codec == "log8":
            decoded = reference.decode_log8(e.fields, group_size)
            scale = reference.log8_scale(e.fields, group_size, w.shape).astype(np.float64)
        else:
            decoded = reference.decode_packed(e.fields, codec, group_size)
            scale = reference.packed_scale(e.fields, group_size, w.shape).astype(np.float64)
        np.testing.assert_allclose(values, decoded, rtol=2e-7)
        target = reference.feedback_targets(w, values, gram, 0.01)
        far = np.abs(target - values) - nearest_distance(target, scale, codec, float(e.fields["mu"]))
        assert far.max() < 2e-5 * np.abs(scale).max()  # nearest, except for ties
        sure = (np.abs(target) > 1e-5 * np.abs(scale)) & (values != 0)
        np.testing.assert_array_equal((values < 0)[sure], (target < 0)[sure])


@pytest.mark.parametrize("cols", [256, 257, 1300])
def test_factors_of_many_columns(rng, cols):
    """They are found in parts, and are those of the whole."""
    x = rng.normal(size=(cols // 2, cols)) * np.exp(rng.normal(size=cols))
    gram = x.T @ x
    feedback = qins.ErrorFeedback(gram)
    back = feedback.order[::-1]
    damped = gram[np.ix_(back, back)] + 0.1 * gram.diagonal().mean() * np.eye(cols)
    lower = np.linalg.cholesky(damped)
    expected = np.tril((lower / lower.diagonal())[::-1, ::-1].T, -1)
    np.testing.assert_allclose(feedback.factors, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("codec", ["log8", "log6", "log5", "log4"])
def test_every_instruction_set_and_number_of_threads_agrees(rng, codec):
    w = rng.normal(0, 0.02, (100, 96)).astype(np.float32)
    x = inputs(rng, 500, 96)
    feedback = qins.ErrorFeedback(x.T @ x)
    first = None
    for isa in qins.isas():
        for threads in (1, 3):
            qins.set_num_threads(threads)
            with qins.use_isa(isa):
                e = feedback.encode(w, codec, group_size=32)
            first = first or e
            assert all(np.array_equal(e.fields[n], first.fields[n]) for n in first.fields)


@pytest.mark.parametrize("codec", ["log8", "log6", "log4"])
def test_outputs_are_closer(isa, rng, codec):
    w, x = rng.normal(0, 0.02, (64, 128)).astype(np.float32), inputs(rng, 2000, 128)
    gram = x[:1000].T @ x[:1000]

    def error(e):
        return float((((e.decode() - w).astype(np.float64) @ x[1000:].T) ** 2).sum())  # on other tokens

    nearest = error(qins.encode(w, codec, group_size=128))
    weighed = error(qins.encode(w, codec, group_size=128, importance=gram.diagonal()))
    fed = error(qins.ErrorFeedback(gram, 0.01).encode(w, codec, group_size=128))
    assert fed < 0.5 * weighed < 0.5 * nearest


@pytest.mark.parametrize("codec", ["log8", "log5"])
@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_dtypes(rng, dtype, codec):
    w = rng.normal(0, 0.02, (8, 32)).astype(np.float32)
    held = w.astype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    feedback = qins.ErrorFeedback(np.eye(32))
    a, b = feedback.encode(held, codec), feedback.encode(held.astype(np.float32), codec)
    for name in b.fields:
        np.testing.assert_array_equal(a.fields[name], b.fields[name])


@pytest.mark.parametrize("codec", ["log8", "log6", "log5", "log4"])
def test_uncorrelated_inputs_give_the_nearest_codes(isa, rng, codec):
    w = rng.normal(0, 0.02, (20, 40)).astype(np.float32)
    a, b = qins.ErrorFeedback(np.eye(40)).encode(w, codec), qins.encode(w, codec)
    for name in b.fields:
        np.testing.assert_array_equal(a.fields[name], b.fields[name])


@pytest.mark.parametrize(("codec", "group_size"), [("log8", 8), ("log6", 32), ("log4", 64)])
def test_hard_weights(isa, codec, group_size):
    w = np.zeros((18, 24), np.float32)
    w[1], w[2, 3], w[3], w[4, 5] = 1e-42, 1e30, -3.0, 1e-30
    gram = np.full((24, 24), 0.9) + 0.1 * np.eye(24)
    values = qins.ErrorFeedback(gram).encode(w, codec, group_size=group_size).decode()
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


@pytest.mark.parametrize("codec", ["log8", "log6", "log5", "log4"])
def test_importance(isa, rng, codec):
    w = rng.normal(0, 0.02, (64, 256)).astype(np.float32)
    importance = np.exp(3 * rng.normal(size=256))
    plain, weighed = (qins.encode(w, codec, group_size=64, importance=i) for i in (None, importance))

    def error(e):
        return float((importance * (e.decode().astype(np.float64) - w) ** 2).sum())

    assert error(weighed) < error(plain)
    same = qins.encode(w, codec, group_size=64, importance=np.full(256, 7.0))
    assert all(np.array_equal(same.fields[n], plain.fields[n]) for n in plain.fields)
    # only ratios matter, at any magnitude
    again = qins.encode(w, codec, group_size=64, importance=importance * 1e200)
    assert all(np.array_equal(again.fields[n], weighed.fields[n]) for n in weighed.fields)


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
