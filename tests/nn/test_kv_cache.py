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
    for i in range(8):  # ranges whose largest exponents, rounded, are past the largest float's
        v[0, 1, 3 + i, 0] = torch.finfo(torch.float32).max
        v[0, 1, 3 + i, 1:] *= 10.0 ** (4 * i)
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


PACKED = ["log6", "log5", "log4"]


def stored(kept, tokens):
    """Rows of the first tokens, as the reference's fields."""
    f = {name: t[:, :, :tokens].flatten(0, 2) for name, t in kept.fields.items()}
    codes, scale, group = f["codes"].numpy(), f["scale"].float().flatten().numpy(), f["group_scale"].numpy()
    return {f"codes{reference.BITS[kept.codec]}": codes, "scale": scale, "group_scale": group, "mu": 3.0}


@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 96, 128])
def test_packed_rows_against_reference(isa, codec, dim):
    bits = reference.BITS[codec]
    v = states(2, 2, 9, dim)
    v[0, 0, 0] = 0
    v[0, 0, 1] *= 1e-35
    v[0, 0, 2] *= 1e35
    v[0, 0, 3, 8:] = 0  # groups of zeros, where there are several
    v[0, 1, 0] = 1.0
    v[0, 1, 1, 0] = 3e38
    cache = qins.QINSKVCache(2, 9, 2, dim, v_codec=codec, k_codec=codec)
    cache.update(v / 2, v)
    k, d = cache.get_kv(2)
    fields, rows = stored(cache._values, 9), d.flatten(0, 2).numpy()
    np.testing.assert_array_equal(rows, reference.decode_packed(fields, codec, 32))
    assert cache._values.fields["codes"].shape[-1] == dim * bits // 8
    for i, row in enumerate(v.flatten(0, 2).numpy()):
        if i in (0, 1, 2, 10):  # beyond the range in which scales are searched
            continue
        assert fields["scale"][i] == reference.cache_row_scale(row)
        q = reference.unpack(fields[f"codes{bits}"][i : i + 1], bits)[0]
        for g, tried in enumerate(reference.packed_cache_row(row, 3.0, bits)):
            codes, error = tried[int(fields["group_scale"][i, g])]
            assert error <= min(e for _, e in tried.values()) * (1 + 1e-5) + 1e-30
            assert np.array_equal(codes, q[32 * g : 32 * (g + 1)])
    assert (d[0, 0, 0] == 0).all()
    assert torch.isfinite(d).all()
    torch.testing.assert_close(k[0, 0, 3:], d[0, 0, 3:] / 2, rtol=0, atol=0)  # halves have the same codes
    for i in (1, 2, *range(4, 9)):
        assert dim < 64 or reference.snr_db(v[0, 0, i].numpy(), d[0, 0, i].numpy()) > 6 * bits - 6


@pytest.mark.parametrize("codec", ["log8", "golden", "float16", *PACKED])
def test_growing_tokens(codec):
    """Appended in parts, cropped, reordered and cleared: always what one write of the same tokens holds."""
    k, v = states(3, 2, 300, 40), states(3, 2, 300, 40, seed=1)
    whole = GrowingTokens(codec, codec)
    all_k, all_v = whole.append(k, v)
    tokens, begin = GrowingTokens(codec, codec), 0
    for end in (1, 100, 128, 129, 300):
        got = tokens.append(k[:, :, begin:end], v[:, :, begin:end])
        assert torch.equal(got[0], all_k[:, :, :end])
        assert torch.equal(got[1], all_v[:, :, :end])
        begin = end
    assert tokens.savings() == whole.savings()
    tokens.crop(90)
    got = tokens.append(k[:, :, 90:140], v[:, :, 90:140])
    assert torch.equal(got[1], all_v[:, :, :140])
    order = torch.tensor([2, 0, 2])
    tokens.select(order)
    got = tokens.append(k[order, :, 140:150], v[order, :, 140:150])
    assert torch.equal(got[0], all_k[order, :, :150])
    assert torch.equal(got[1], all_v[order, :, :150])
    tokens.clear()
    assert tokens.savings() == (0, 0, 0)
    assert torch.equal(tokens.append(k[:1], v[:1])[1], all_v[:1])


@pytest.mark.parametrize("codec", ["log8", *PACKED])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_not_finite_add_nothing(codec, bad):
    k = states(2, 3, 5, 16)
    wrong = k.clone()
    wrong[1, 2, 3, 4] = bad
    cache, tokens = qins.QINSKVCache(2, 12, 3, 16, v_codec=codec, k_codec=codec), GrowingTokens(codec, codec)
    for add in (cache.update, tokens.append):
        add(k, k)
        with pytest.raises(ValueError, match="k.*: expected finite values, got 1 NaN or infinite; nothing was added"):
            add(wrong, k)
        with pytest.raises(ValueError, match="v.*: expected finite values, got 1 NaN or infinite; nothing was added"):
            add(k, wrong)
        add(k, k)
    assert cache.seq_len == tokens.length == 10
    want = torch.cat([cache.get_kv(2)[1][:, :, :5]] * 2, 2)
    for got in (*cache.get_kv(2), *tokens.read(torch.float32, torch.float32)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("codec", PACKED)
def test_heads_that_cannot_be_packed(codec):
    message = f"expected a head_dim that is a multiple of 8 for codec '{codec}', got 20"
    for name in ("k", "v"):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            qins.QINSKVCache(1, 4, 1, 20, **{f"{name}_codec": codec})
    tokens = GrowingTokens("log8", codec)
    with pytest.raises(ValueError, match=f"value_states: {message}"):
        tokens.append(states(1, 2, 3, 16), states(1, 2, 3, 20))
    assert (tokens.batch, tokens.length, tokens.savings()) == (0, 0, (0, 0, 0))
    tokens.append(states(2, 2, 3, 20), states(2, 2, 3, 16))


@pytest.mark.parametrize("v_codec", ["golden", "log8", "float16", *PACKED])
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
    for codec in ("golden", "log8", *PACKED):
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
    assert len(seen) == 5


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
    for codec in PACKED:
        cache = qins.QINSKVCache(2, 128, 4, 80, v_codec=codec, k_codec=codec)
        rows = 2 * 128 * 4
        saved = cache.memory_savings()
        assert saved["total_bytes"] == 2 * rows * (10 * reference.BITS[codec] + 2 + 3)
        assert saved["total_bytes"] == sum(t.numel() * t.element_size() for t in cache._values.fields.values()) * 2


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
        (k, v[:, :, :2], r"v: expected batch, heads and tokens of k, \(2, 3, 5\), got \(2, 3, 2\)"),
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
