"""Decoder layers that run ahead of their turn: same answers, and nothing is seen of it whatever happens in between."""

from __future__ import annotations

import copy
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import qins
from qins import _core

transformers = pytest.importorskip("transformers")
from families import FAMILIES, SIZES, converted, divergence, family, layers_of, without_steps  # noqa: E402
from transformers import DynamicCache  # noqa: E402

pytestmark = pytest.mark.once

IDS = torch.randint(3, SIZES["vocab_size"], (1, 500), generator=torch.Generator().manual_seed(1))
PROMPT = 12
# transformers 4 passes these models' layers the rotations of both kinds of attention
OWN_MODULES = {"Gemma3"} if transformers.__version__ < "5" else set()
LAYERS = SIZES["num_hidden_layers"]


class Counted:
    """The core, with the number of layers of each call of decode_layers and the number of calls of decode_layer."""

    def __init__(self):
        self.ahead, self.alone = [], 0

    def __getattr__(self, name):
        return getattr(_core, name)

    def decode_layers(self, places, *args):
        self.ahead.append(len(places))
        return _core.decode_layers(places, *args)

    def decode_layer(self, *args):
        self.alone += 1
        return _core.decode_layer(*args)


@pytest.fixture
def counted(monkeypatch):
    found = Counted()
    monkeypatch.setattr("qins.hf.ahead._core", found)
    monkeypatch.setattr("qins.hf.decoding._core", found)
    return found


@pytest.fixture
def model():
    return family("Llama")


def prefilled(model, batch=1, **codecs):
    cache = qins.QINSCache(model.config, **codecs) if codecs else DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :PROMPT].repeat(batch, 1), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def steps(model, cache, begin=PROMPT, end=40, batch=1):
    """Return the logits of one token after another."""
    ids = IDS.repeat(batch, 1)
    out = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(begin, end)]
    return torch.cat(out, 1)


def alone(model, monkeypatch, **how):
    """Return the same logits of layers that do not run ahead; their first step ever is the modules'."""
    with monkeypatch.context() as m:
        m.setattr("qins.hf.ahead.run_ahead", lambda *args: None)
        steps(model, prefilled(model, **how), end=PROMPT + 2, batch=how.get("batch", 1))
        return steps(model, prefilled(model, **how), batch=how.get("batch", 1))


@pytest.mark.parametrize("codecs", [{}, {"k_codec": "log8"}, {"k_codec": "log4", "v_codec": "log5"}])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_same_answers(name, batch, codecs, counted, monkeypatch):
    """Bit for bit those of one layer at a time, past growing caches and the length of sliding windows."""
    model = family(name)
    want = alone(model, monkeypatch, batch=batch, **codecs)
    assert not counted.ahead
    once = counted.alone
    assert torch.equal(steps(model, prefilled(model, batch, **codecs), batch=batch), want)
    whole = [layer._qins_step is not None and layer._qins_step.about.rest is None for layer in layers_of(model)]
    if name in OWN_MODULES or not any(a and b for a, b in pairwise(whole)):
        assert not counted.ahead
    elif name in ("Gemma2", "Gemma3"):  # each layer's mask is another than that of the layer before: tried once
        assert len(counted.ahead) < LAYERS
    elif name == "Qwen2":  # and these only some
        assert counted.ahead
    else:
        assert counted.ahead == [LAYERS] * len(counted.ahead)
        assert len(counted.ahead) > 20
        assert counted.alone - once < once / 4


@pytest.mark.parametrize("codecs", [{}, {"k_codec": "log8"}])
def test_caches_that_grow(model, codecs, counted, monkeypatch):
    """Where one layer's cache has no room left, every layer waits for its turn."""
    with monkeypatch.context() as m:
        m.setattr("qins.hf.ahead.run_ahead", lambda *args: None)
        steps(model, prefilled(model, **codecs), end=PROMPT + 2)
        want = steps(model, prefilled(model, **codecs), end=500)
    cache = prefilled(model, **codecs)
    counted.alone = 0
    assert torch.equal(steps(model, cache, end=500), want)
    assert len(counted.ahead) > 470
    assert counted.alone >= 2 * LAYERS  # the first step, and at least one that grew


def test_half_precision_and_inference_mode(model, counted, monkeypatch):
    model.to(torch.bfloat16)
    want = alone(model, monkeypatch)
    cache = prefilled(model)
    with torch.inference_mode():
        got = steps(model, cache)
    assert torch.equal(got, want)
    assert len(counted.ahead) > 20


def test_generate(model, counted):
    how = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones(1, PROMPT, dtype=torch.long)}
    got = model.generate(IDS[:, :PROMPT], pad_token_id=0, **how)
    assert counted.ahead == [LAYERS] * len(counted.ahead)
    assert len(counted.ahead) > 20
    without_steps(model)
    assert torch.equal(got, model.generate(IDS[:, :PROMPT], pad_token_id=0, **how))


@torch.no_grad()
def padded_steps(model, codecs, end=40, cache=None):
    """Return logits of three sequences, two of them with padding before the prompt."""
    if cache is None:
        cache = qins.QINSCache(model.config, **codecs) if codecs else DynamicCache(config=model.config)
    seen = torch.ones(3, end, dtype=torch.long)
    seen[0, :5] = seen[2, : PROMPT - 1] = 0
    ids, out = IDS[:, :end].repeat(3, 1), []
    for begin, t in pairwise([0, *range(PROMPT, end + 1)]):
        where = (seen[:, :t].cumsum(1) - 1).clamp(min=0)[:, begin:]
        given = {"attention_mask": seen[:, :t], "position_ids": where}
        out.append(model(ids[:, begin:t], past_key_values=cache, use_cache=True, **given).logits[:, -1])
    return torch.stack(out[1:], 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # bool masks, and addends
@pytest.mark.parametrize("codecs", [{}, {"k_codec": "log8"}])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3"])
def test_padding(name, codecs, attention, counted, monkeypatch):
    model = family(name, **{"sliding_window_pattern": 4} if name == "Gemma3" else {})
    model.set_attn_implementation(attention)
    with monkeypatch.context() as m:
        m.setattr("qins.hf.ahead.run_ahead", lambda *args: None)
        padded_steps(model, codecs, end=PROMPT + 3)
        want = padded_steps(model, codecs)
    assert torch.equal(padded_steps(model, codecs), want)
    assert len(counted.ahead) > 20 or name in OWN_MODULES
    without_steps(model)
    assert divergence(want, padded_steps(model, codecs)) < (1e-6 if codecs else 1e-8)


def test_another_mask_for_one_layer(model, counted):
    """A layer whose mask is another one, or has become wider, does not take what ran ahead with the first one's."""

    def narrowed(module, args, given):
        mask = given["attention_mask"].clone()
        mask[..., 5:12] = False
        return args, {**given, "attention_mask": mask}

    padded_steps(model, {})
    handle = model.model.layers[2].register_forward_pre_hook(narrowed, with_kwargs=True)
    counted.ahead.clear()
    got = padded_steps(model, {})
    handle.remove()
    plain = padded_steps(model, {})
    without_steps(model)
    handle = model.model.layers[2].register_forward_pre_hook(narrowed, with_kwargs=True)
    want = padded_steps(model, {})
    assert divergence(got, want) < 1e-8
    assert divergence(plain, want) > 1e-6


@pytest.mark.parametrize("codecs", [{}, {"k_codec": "log8"}])
def test_a_mask_that_is_too_short_for_one_layer(model, codecs, counted):
    """Of a layer that has seen a token more: it waits for its turn, and then is the modules' to refuse."""
    cache = qins.QINSCache(model.config, **codecs) if codecs else DynamicCache(config=model.config)
    padded_steps(model, codecs, end=20, cache=cache)
    x = torch.randn(3, 1, SIZES["hidden_size"])
    rotation = model.model.rotary_emb(x, position_ids=torch.tensor([[20]]))
    mask = torch.ones(3, 1, 1, 21, dtype=torch.bool)
    how = {"position_embeddings": rotation, "past_key_values": cache, "use_cache": True, "attention_mask": mask}
    with torch.no_grad():
        model.model.layers[2](x, **how)
        counted.ahead.clear()
        seen = torch.ones(3, 21)
        seen[:, 0] = 0
        with pytest.raises(RuntimeError, match="size"):
            model(IDS[:, 20:21].repeat(3, 1), past_key_values=cache, attention_mask=seen, use_cache=True)
    assert counted.ahead == [2]


def test_hidden_states_are_those_of_each_layer(model, counted):
    cache, other, seen = prefilled(model), prefilled(model), []
    steps(model, cache, end=20)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, result: seen.append(result[0] if type(result) is tuple else result))
    counted.ahead.clear()
    steps(model, cache, begin=20, end=21)
    assert counted.ahead == [LAYERS]
    got = seen[:]
    without_steps(model)
    steps(model, other, end=21)
    assert len(got) == LAYERS
    for a, b in zip(got, seen[-LAYERS:], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for a, b in pairwise(got):
        assert not torch.allclose(a, b, atol=1e-2)


def with_hook(model, hook, layer=1):
    """Return the logits of a model whose layer has a hook on its result, from the tenth decode step on."""
    cache = prefilled(model)
    first = steps(model, cache, end=PROMPT + 10)
    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        return torch.cat([first, steps(model, cache, begin=PROMPT + 10)], 1)
    finally:
        handle.remove()


def replaced(module, args, result):
    if isinstance(result, tuple):  # as transformers 4 returns it
        return (result[0] * 1.5, *result[1:])
    return result * 1.5


def written(module, args, result):
    (result[0] if isinstance(result, tuple) else result).mul_(1.5)


@pytest.mark.parametrize("hook", [replaced, written])
def test_hooks_that_change_what_the_next_layer_gets(model, hook, counted):
    got = with_hook(model, hook)
    # in vain once, then the layers up to the hook's and the rest apart
    assert counted.ahead == [LAYERS] * counted.ahead.count(LAYERS) + [2] * counted.ahead.count(2)
    assert counted.ahead.count(LAYERS) <= 10 < counted.ahead.count(2)
    plain = steps(model, prefilled(model))
    without_steps(model)
    want = with_hook(model, hook)
    assert divergence(got, want) < 1e-8
    assert divergence(plain, want) > 1e-6


def test_hooks_see_no_later_layer_in_the_cache(model, counted):
    cache = prefilled(model)
    steps(model, cache, end=20)
    seen = []

    def look(module, args, result):
        copied = copy.deepcopy(cache)
        seen.append([layer.get_seq_length() for layer in cache.layers])
        assert [layer.keys.shape[2] for layer in copied.layers] == seen[-1]

    handle = model.model.layers[1].register_forward_hook(look)
    steps(model, cache, begin=20, end=22)
    handle.remove()
    assert seen == [[21, 21, 20, 20], [22, 22, 21, 21]]
    assert counted.ahead[-1] == LAYERS


def test_weights_and_hooks_that_change_between_tokens(model):
    """What runs ahead is asked anew for every token: here of layers that are not the leading one."""

    def run(model):
        cache, out = prefilled(model), []
        out.append(steps(model, cache, end=16))
        with torch.no_grad():
            model.model.layers[2].input_layernorm.weight.mul_(1.5)
        out.append(steps(model, cache, begin=16, end=19))
        model.model.layers[3].mlp.up_proj = qins.QINSLinear.from_linear(other)
        out.append(steps(model, cache, begin=19, end=22))
        for begin, new in ((22, False), (28, True)):
            watched, calls = model.model.layers[1].mlp.down_proj, []
            if new:
                watched._forward_hooks = type(watched._forward_hooks)()
            handle = watched.register_forward_hook(lambda *args, calls=calls: calls.append(1))
            out.append(steps(model, cache, begin=begin, end=begin + 3))
            handle.remove()
            assert len(calls) == 3
            out.append(steps(model, cache, begin=begin + 3, end=begin + 6))
        return torch.cat(out, 1)

    torch.manual_seed(3)
    other = nn.Linear(64, 96, bias=True)
    got = run(model)
    model = family("Llama")
    without_steps(model)
    assert divergence(got, run(model)) < 1e-8


def test_an_error_between_two_layers(model):
    """Leaves the caches as without steps: those of the layers before it have one more token."""
    cache = prefilled(model)
    steps(model, cache, end=20)

    def fail(module, args):
        raise RuntimeError("in between")

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in between"):
        steps(model, cache, begin=20, end=21)
    handle.remove()
    assert [layer.get_seq_length() for layer in cache.layers] == [21, 21, 20, 20]
    for layer in cache.layers[:2]:
        layer.crop(-1 if transformers.__version__ >= "5" else 20)
    other = prefilled(model)
    want = steps(model, other, end=30)[:, 20 - PROMPT :]
    assert torch.equal(steps(model, cache, begin=20, end=30), want)


def test_a_layer_called_by_itself(model):
    """Not after the one before it, though that ran ahead."""
    cache = prefilled(model)
    steps(model, cache, end=20)
    handle = model.model.layers[0].register_forward_hook(lambda *args: stop())

    def stop():
        raise StopIteration

    with pytest.raises((StopIteration, RuntimeError)):
        steps(model, cache, begin=20, end=21)
    handle.remove()
    x = torch.randn(1, 1, SIZES["hidden_size"])
    rotation = model.model.rotary_emb(x, position_ids=torch.tensor([[20]]))
    how = {"position_embeddings": rotation, "past_key_values": cache, "use_cache": True, "attention_mask": None}
    with torch.no_grad():
        got = model.model.layers[1](x, **how)
        without_steps(model)
        other = prefilled(model)
        steps(model, other, end=20)
        want = model.model.layers[1](x, **{**how, "past_key_values": other})
    assert torch.allclose(*(r[0] if isinstance(r, tuple) else r for r in (got, want)), atol=1e-5)


def test_threads_with_caches_of_their_own(model):
    steps(model, prefilled(model))
    want = steps(model, prefilled(model))
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: steps(model, prefilled(model)), range(12))]
    assert all(torch.equal(got, want) for got in found)


def test_states_that_a_quantized_cache_cannot_hold():
    """The layers from there on run their modules, which report it."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    converted(model)
    cache = prefilled(model, k_codec="log8")
    steps(model, cache, end=20)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.scale.fill_(float("inf"))
    with pytest.raises(ValueError, match="finite"):
        steps(model, cache, begin=20, end=21)
    assert [layer.get_seq_length() for layer in cache.layers] == [21, 21, 20, 20]


def test_sizes_other_than_before(model, counted):
    """A batch that shrinks, and several tokens at a time, in between."""
    cache = prefilled(model, batch=3)
    steps(model, cache, end=20, batch=3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    got = steps(model, cache, begin=20, end=24, batch=2)
    with torch.no_grad():
        model(IDS[:, 24:27].repeat(2, 1), past_key_values=cache, use_cache=True)
    last = steps(model, cache, begin=27, end=30, batch=2)
    without_steps(model)
    other = prefilled(model, batch=2)
    want = steps(model, other, end=30, batch=2)
    assert divergence(got, want[:, 20 - PROMPT : 24 - PROMPT]) < 1e-8
    assert divergence(last, want[:, 27 - PROMPT :]) < 1e-8


def test_a_chain_ends_where_the_model_does(model, counted):
    """A model that lost its last layers."""
    steps(model, prefilled(model))
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    counted.ahead.clear()
    got = steps(model, prefilled(model))
    assert set(counted.ahead) == {2}
    without_steps(model)
    assert divergence(got, steps(model, prefilled(model))) < 1e-8


# -- the core's functions ------------------------------------------------------------------------------


def test_are_unchanged():
    value, empty = object(), {}
    where = {"a": value}
    assert _core.are_unchanged(((where, "a", value),), (empty,))
    assert not _core.are_unchanged(((where, "a", object()),), ())
    assert not _core.are_unchanged(((where, "b", value),), ())
    empty["hook"] = 1
    assert not _core.are_unchanged((), (empty,))
    for wrong in [((), [])], [()], [(3,), ()], [((where, "a", value), 3), ()], [((where, "a"),), ()]:
        with pytest.raises(TypeError, match="are_unchanged: expected"):
            _core.are_unchanged(*wrong)
    with pytest.raises(TypeError, match="are_unchanged: expected a dict, got 3"):
        _core.are_unchanged((), (3,))
    with pytest.raises(TypeError, match="unhashable"):
        _core.are_unchanged(((where, [], value),), ())


def test_calls_of_decode_layers_that_are_wrong():
    layer = layer_of(np.random.default_rng(0))[0]
    store = (0, 0, 0, 0)
    assert _core.decode_layers([], *[0] * 12) == 0
    for wrong in [3], [(3,)], [[layer, store, store, 0, 0, 0]], [(layer, store, 3, 0, 0, 0)]:
        with pytest.raises(TypeError, match=r"expected \(layer, keys, values, room, past, rotary_dim\)"):
            _core.decode_layers(wrong, *[0] * 12)
    with pytest.raises(ValueError, match="PyCapsule"):
        _core.decode_layers([(3, store, store, 0, 0, 0)], *[0] * 12)
    with pytest.raises(TypeError, match="expected 4 numbers, got 3"):
        _core.decode_layers([(layer, store, store[:3], 0, 0, 0)], *[0] * 12)
    with pytest.raises(TypeError, match="expected a list"):
        _core.decode_layers((), *[0] * 12)
    with pytest.raises(TypeError, match="expected 12 numbers, got 11"):
        _core.decode_layers([], *[0] * 11)


def layer_of(rng, hidden=1024):
    """Return a layer of one head whose matrices are all the same, and what must stay alive."""
    e = qins.encode(rng.standard_normal((hidden, hidden)).astype(np.float32), "log8")
    from qins.codec import CODEC_NUMBER, core_addresses, field_names

    at = [e.fields[n].ctypes.data for n in field_names("log8", e.group_size)]
    product = (CODEC_NUMBER["log8"], *core_addresses(at, "log8", e.group_size), *e.shape, e.group_size or 0, 0)
    norm = np.ones(hidden, np.float32)
    sizes = (hidden, 4, 4, hidden // 4, hidden, 0, 0)
    norms = (norm.ctypes.data, 0, norm.ctypes.data, 0, 0, 0, 0)
    layer = _core.decoder_layer((product,) * 7, norms, sizes, (1e-5, 1e-5, 0.1, 0.0, 1.0))
    return layer, e, norm


def test_interrupted_between_layers():
    """A signal's handler runs after some hundredths of a second of a call that takes several seconds."""
    layer, *alive = layer_of(np.random.default_rng(0))
    x, y = np.ones((1, 1024), np.float32), np.empty((1, 1024), np.float32)
    cache = np.zeros((2, 4, 2, 256), np.float32)
    stores = [(0, cache[i].ctypes.data, 0, 0) for i in range(2)]
    places = [(layer, *stores, 2, 1, 0)] * 20000

    def interrupt(number, frame):
        raise InterruptedError("asked to")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(InterruptedError, match="asked to"):
            _core.decode_layers(places, 0, x.ctypes.data, y.ctypes.data, 0, 1, 0, 0, 0, 0, 0, 0, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert alive
