"""KV caches against the reference of the formats and against transformers' own cache."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

import qins
from qins.nn import GrowingTokens

transformers = pytest.importorskip("transformers")


def states(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5).to(dtype)


@pytest.mark.parametrize("dim", [1, 7, 16, 64, 80])
def test_golden_rows_against_reference(isa, dim):
    v = states(2, 3, 20, dim)
    v[0, 0, 0] = 0
    v[0, 0, 1] = 5
    v[0, 0, 2] *= 1e-9  # mostly below 1e-8
    v[0, 0, 3, 1:] = 0
    v[0, 1, 0] *= 1e30
    v[0, 1, 1, 0] = 1e38
    v[0, 1, 2] = 1.0
    v[0, 1, 2, -1] = 1.0000001
    cache = qins.QINSKVCache(2, 30, 3, dim)
    cache.update(states(2, 3, 20, dim), v)
    _, d = cache.get_kv(2)
    f = {n: t[:, :, :20].numpy() for n, t in cache._values.fields.items()}
    off = 0
    for at in np.ndindex(2, 3, 20):
        expected = reference.encode_golden(v[at].numpy())
        difference = np.abs(f["stored"][at].astype(int) - expected["stored"])
        assert difference.max() <= 1
        off += int(difference.sum())
        assert np.array_equal(f["sign"][at], expected["sign"])
        np.testing.assert_array_equal(f["range"][at], np.float32([expected["log_min"], expected["log_max"]]))
        fields = {"stored": f["stored"][at], "sign": f["sign"][at], "log_min": expected["log_min"]}
        exact = reference.decode_golden(fields | {"log_max": expected["log_max"]})
        np.testing.assert_allclose(d[at].numpy(), exact, rtol=1e-5)
    assert off <= max(1, v.numel() // 10_000)


@pytest.mark.parametrize("dim", [1, 7, 64, 100])
def test_log8_rows_against_reference(isa, dim):
    v = states(2, 2, 9, dim)
    v[0, 0, 0] = 0
    v[0, 0, 1] *= 1e-35
    v[0, 0, 2] *= 1e35
    cache = qins.QINSKVCache(2, 9, 2, dim, v_codec="log8", k_codec="log8")
    cache.update(v * 2, v)
    k, d = cache.get_kv(2)
    f = cache._values.fields
    rows = {"codes": f["codes"].flatten(0, 2).numpy(), "scale": f["scale"].float().flatten().numpy(), "mu": 3.0}
    np.testing.assert_array_equal(d.flatten(0, 2).numpy(), reference.decode_log8(rows))
    torch.testing.assert_close(k, d * 2, rtol=0, atol=0)  # scaling by a power of two keeps the codes
    assert (d[0, 0, 0] == 0).all()
    if dim >= 64:
        for at in np.ndindex(2, 2, 9):
            assert at == (0, 0, 0) or reference.snr_db(v[at].numpy(), d[at].numpy()) > 38


@pytest.mark.parametrize("v_codec", ["golden", "log8", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_updates_add_up(v_codec, dtype):
    k, v = states(2, 3, 11, 24, dtype=dtype), states(2, 3, 11, 24, seed=1, dtype=dtype)
    whole = qins.QINSKVCache(3, 16, 3, 24, v_codec=v_codec)
    whole.update(k, v)
    parts = qins.QINSKVCache(3, 16, 3, 24, v_codec=v_codec)
    for a, b in ((0, 5), (5, 6), (6, 6), (6, 11)):
        parts.update(k[:, :, a:b], v.transpose(1, 2).contiguous().transpose(1, 2)[:, :, a:b])
    for got, same in zip(parts.get_kv(2), whole.get_kv(2), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, same)
    one = parts.get_kv(1)
    assert torch.equal(one[1], whole.get_kv(2)[1][:1])
    assert torch.equal(whole.get_kv(2)[0], k.half().to(dtype))


def test_tokens_before_heads():
    k, v = states(2, 3, 11, 24), states(2, 3, 11, 24, seed=1)
    heads_first, tokens_first = qins.QINSKVCache(2, 16, 3, 24), qins.QINSKVCache(2, 16, 3, 24, device="cpu")
    for a, b in ((0, 5), (5, 8), (8, 11)):  # also three tokens at once, the number of heads
        heads_first.update(k[:, :, a:b], v[:, :, a:b])
        tokens_first.update(k[:, :, a:b].transpose(1, 2), v[:, :, a:b].transpose(1, 2))
    for got, expected in zip(tokens_first.get_kv(2), heads_first.get_kv(2), strict=True):
        assert torch.equal(got.transpose(1, 2), expected)
    with pytest.raises(ValueError, match="order of dimensions"):
        tokens_first.update(k[:, :, :1], v[:, :, :1])
    with pytest.raises(ValueError, match="order of dimensions"):
        heads_first.update(k[:, :, :1].transpose(1, 2), v[:, :, :1].transpose(1, 2))
    with pytest.raises(ValueError, match="device"):
        qins.QINSKVCache(1, 1, 1, 1, "cuda")


def test_threads_and_instruction_sets_agree():
    v = states(4, 8, 100, 64)
    seen = set()
    for codec in ("golden", "log8"):
        results = set()
        for name in qins.isas():
            for threads in (1, 3):
                qins.set_num_threads(threads)
                with qins.use_isa(name):
                    cache = qins.QINSKVCache(4, 100, 8, 64, v_codec=codec)
                    cache.update(v, v)
                    results.add(cache.get_kv(4)[1].numpy().tobytes())
        assert len(results) == 1
        seen |= results
    qins.set_num_threads(None)
    assert len(seen) == 2


def test_memory():
    cache = qins.QINSKVCache(2, 128, 4, 64)
    saved = cache.memory_savings()
    elements, rows = 2 * 128 * 4 * 64, 2 * 128 * 4
    assert saved["key_bytes"] == 2 * elements
    assert saved["value_bytes"] == 2 * elements + 8 * rows
    held = sum(t.numel() * t.element_size() for kept in (cache._keys, cache._values) for t in kept.fields.values())
    assert saved["total_bytes"] == held
    small = qins.QINSKVCache(2, 128, 4, 64, v_codec="log8", k_codec="log8").memory_savings()
    assert small["total_bytes"] == 2 * (elements + 2 * rows)
    assert small["compression_float16"] > 1.93
    assert small["compression_float32"] > 3.87


def test_errors_change_nothing():
    cache = qins.QINSKVCache(2, 8, 3, 16)
    k, v = states(2, 3, 5, 16), states(2, 3, 5, 16, seed=1)
    cache.update(k, v)
    before = cache.get_kv(2)
    bad = v.clone()
    bad[1, 2, 3, 4] = float("nan")
    cases = [
        (k, bad, "v: expected finite values, got 1 NaN"),
        (bad, v, "k: expected finite values, got 1 NaN"),
        (k * 1e6, v, "too large for float16"),
        (k, v, "at most 3 more tokens"),
        (k[:1], v[:1], "expected 2 sequences"),
        (k[:, :2], v[:, :2], "3 heads of 16"),
        (k[..., :8], v[..., :8], "3 heads of 16"),
        (k, v[:, :, :2], "v: expected batch, heads and tokens"),
        (k[0], v[0], "shape"),
        (k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), "1 to 2 sequences"),
    ]
    for a, b, message in cases:
        a, b = (a[:, :, :3], b[:, :, :3]) if "finite" in message or "large" in message else (a, b)
        if "NaN" in message:
            a, b = a.clone(), b.clone()
            (b if message.startswith("v") else a)[1, 2, 2, 4] = float("inf")
            (b if message.startswith("v") else a)[1, 2, 2, 5] = 0
        with pytest.raises(ValueError, match=message):
            cache.update(a, b)
        assert all(torch.equal(x, y) for x, y in zip(cache.get_kv(2), before, strict=True))
    with pytest.raises(TypeError, match="floating-point"):
        cache.update(k.int(), v.int())
    with pytest.raises(ValueError, match="batch_size"):
        cache.get_kv(3)
    with pytest.raises(ValueError, match="v_codec"):
        qins.QINSKVCache(1, 1, 1, 1, v_codec="int4")
    with pytest.raises(ValueError, match="head_dim"):
        qins.QINSKVCache(1, 1, 1, 0)
    cache.reset()
    cache.update(k[:1], v[:1])
    assert "seq_len=5" in repr(cache)


def test_a_cache_cropped_to_nothing_has_no_shapes():
    tokens = GrowingTokens("log8", "golden")
    assert tokens.shapes == ()
    tokens.append(states(2, 3, 5, 16), states(2, 3, 5, 8))
    assert tokens.shapes == ((2, 3, 16), (2, 3, 8))
    tokens.crop(0)
    assert tokens.shapes == ()


@pytest.mark.parametrize("fraction", [1.0, 0.97, 0.94, 0.91])
def test_log8_scales_are_the_best_of_four(fraction):
    """A row of exact levels at a fraction of its largest magnitude, which alone is clipped, gets that fraction."""
    dim, scale = 4000, torch.tensor(fraction).bfloat16()
    levels = torch.from_numpy(reference.log8_levels(3.0)).float()
    v = scale.float() * levels[torch.randint(60, 126, (1, 1, 4, dim), generator=torch.Generator().manual_seed(0))]
    v[..., 5] = 1.0
    cache = qins.QINSKVCache(1, 4, 1, dim, v_codec="log8")
    cache.update(v, v)
    assert (cache._values.fields["scale"].flatten() == scale).all()
