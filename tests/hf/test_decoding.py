"""Decoder layers in one call of the core: same results as the modules, and fallback to the modules where needed."""

from __future__ import annotations

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import long_but
from torch import nn

import qins

transformers = pytest.importorskip("transformers")
from families import FAMILIES, SIZES, converted, divergence, family, layers_of, proved, without_steps  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers.cache_utils import StaticLayer  # noqa: E402

from qins.hf import decoding, layer_description  # noqa: E402

pytestmark = pytest.mark.once  # one test forces every instruction set

# for families where not every layer runs whole, MLP included: whether each layer does
WHOLE = {n: [False] * 4 for n in ("Mixtral", "GptOss", "GraniteMoe")} | {"Qwen3Moe": [False, True, False, False]}
# transformers 4 passes these models' layers the rotations of both kinds of attention
OWN_MODULES = {"Gemma3"} if transformers.__version__ < "5" else set()
COUNTED = "cumulative_length" in StaticLayer.__annotations__


def texts(batch=1, tokens=40, padding=0, seed=1):
    ids = torch.randint(3, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


@torch.no_grad()
def logits(model, ids, mask, prompt=12, at_once=1, cache=None):
    """Return the logits of a prompt's last token and of all later tokens, `at_once` tokens per step."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = []
    for begin, end in [(0, prompt), *((t, t + at_once) for t in range(prompt, ids.shape[1], at_once))]:
        out.append(
            model(
                ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                past_key_values=cache, use_cache=True,
            ).logits
        )  # fmt: skip
    return torch.cat([out[0][:, -1:], *out[1:]], 1)


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 4)])
@pytest.mark.parametrize("name", FAMILIES)
def test_same_answers_as_the_modules(name, batch, padding, at_once):
    """Beyond the length of sliding windows, with left padding, and with several tokens at a time."""
    model = family(name)
    ids, mask = texts(batch, padding=padding)
    got = logits(model, ids, mask, at_once=at_once)
    assert len(layers_of(model)) == SIZES["num_hidden_layers"]
    assert any(proved(model)) == all(proved(model)) == (name not in OWN_MODULES)
    if name not in OWN_MODULES:
        whole = [layer._qins_step.about.rest is None for layer in layers_of(model)]
        assert whole == WHOLE.get(name, [True] * 4)
    without_steps(model)
    assert divergence(got, logits(model, ids, mask, at_once=at_once)) < 1e-8


CACHES = [
    ("float16", "log8"), ("float16", "golden"), ("log8", "log8"), ("golden", "float16"), ("log6", "log6"),
    ("log8", "log5"), ("log4", "log4"),
]  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("codecs", long_but([("float16", "golden"), ("log8", "log8"), ("log4", "log4")], CACHES))
@pytest.mark.parametrize(
    ("name", "batch", "padding"), [("Llama", 1, 0), ("Qwen3", 3, 4), ("Gemma2", 1, 0), ("GptOss", 3, 4)]
)
def test_quantized_caches(name, batch, padding, codecs, at_once):
    """Keys and values in their codes; a difference in rounding may change one to its neighbor."""
    model = family(name)
    ids, mask = texts(batch, padding=padding)

    def cache():
        return qins.QINSCache(model.config, k_codec=codecs[0], v_codec=codecs[1])

    got = logits(model, ids, mask, at_once=at_once, cache=cache())
    assert all(proved(model))
    floats = divergence(got, logits(model, ids, mask, at_once=at_once))
    without_steps(model)
    assert divergence(got, logits(model, ids, mask, at_once=at_once, cache=cache())) < min(1e-6, floats)


@pytest.mark.parametrize("codec", ["log8", "log6", "log5", "log4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding_with_codes_is_no_reason_to_give_up(dtype, codec):
    """Short prompts, where a neighboring code changes results by more than rounding; large scores in fixed point."""
    model = family("Llama", initializer_range=0.2).to(dtype)
    for seed, prompt in enumerate((1, 2, 3, 1, 5, 2, 1, 3, 30, 30)):
        ids, mask = texts(tokens=prompt + 1, seed=seed)
        for layer in layers_of(model):
            layer._qins_step._proved.clear()
        logits(model, ids, mask, prompt=prompt, cache=qins.QINSCache(k_codec=codec, v_codec=codec))
        assert all(proved(model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, attention):
    model = family("Llama", attn_implementation=attention)
    ids, mask = texts(2, padding=3)
    exact = logits(model, ids, mask)
    model = family("Llama", attn_implementation=attention).to(dtype)
    got = logits(model, ids, mask).float()
    assert all(proved(model))
    without_steps(model)
    modules = logits(model, ids, mask).float()
    # rounding once is nearer to the float32 result than rounding after each operation
    assert (got - exact).norm() < 1.2 * (modules - exact).norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_soft_caps(attention):
    """Attention scores far beyond Gemma 2's cap; transformers applies the cap in eager attention only."""
    if attention == "sdpa" and not transformers.Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("NOT RUN: this transformers refuses SDPA for Gemma 2")
    model = family("Gemma2", attn_implementation=attention, attn_logit_softcapping=2.0, initializer_range=0.3)
    ids, mask = texts()
    got = logits(model, ids, mask)
    assert all(proved(model))
    without_steps(model)
    assert divergence(got, logits(model, ids, mask)) < 1e-6


def test_every_instruction_set(isa):
    model = family("Qwen2")
    ids, mask = texts(2)
    caches = [DynamicCache, lambda: qins.QINSCache(k_codec="golden"), lambda: qins.QINSCache(k_codec="log8")]
    caches += [lambda codec=codec: qins.QINSCache(k_codec=codec, v_codec=codec) for codec in ("log6", "log5", "log4")]
    got = [logits(model, ids, mask, cache=make()) for make in caches]
    without_steps(model)
    for make, found, most in zip(caches, got, (1e-8, *[1e-6] * 5), strict=True):
        assert divergence(found, logits(model, ids, mask, cache=make())) < most


@pytest.mark.parametrize("codec", ["golden", "log9", "log6", "log5", "log4"])
def test_other_codecs(codec):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    qins.convert(model, codec, exclude=())
    ids, mask = texts()
    got = logits(model, ids, mask)
    assert all(proved(model))
    without_steps(model)
    assert divergence(got, logits(model, ids, mask)) < 1e-8


@pytest.mark.parametrize(
    "make",
    [lambda: None, lambda: qins.QINSCache(k_codec="log8"), lambda: qins.QINSCache(k_codec="log5", v_codec="log4")],
    ids=["floats", "codes", "packed"],
)
def test_threads_change_nothing(make):
    model = family("Llama", hidden_size=256, intermediate_size=512, head_dim=64)
    ids, mask = texts(4, tokens=200)
    logits(model, ids, mask, prompt=190, cache=make())  # its first decode step runs the modules
    found = []
    for n in (1, 2, 5):
        qins.set_num_threads(n)
        found.append(logits(model, ids, mask, prompt=190, cache=make()))
    assert all(proved(model))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"prompt_lookup_num_tokens": 3}]
)
def test_generate(how):
    model = family("Llama", initializer_range=0.2)  # whose predictions are far from ties
    ids, mask = texts(1 if "prompt_lookup_num_tokens" in how else 2, tokens=10, padding=2 if how == {} else 0)
    ids[:, 5:] = ids[:, :5]  # something to look up
    arguments = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **how}
    got = model.generate(ids, **arguments)
    assert all(proved(model))
    without_steps(model)
    assert torch.equal(got, model.generate(ids, **arguments))


def test_loaded_models_decode_in_steps(tmp_path):
    family("Llama").save_pretrained(tmp_path / "out")
    model = qins.load(tmp_path / "out")
    ids, mask = texts()
    logits(model, ids, mask)
    assert all(proved(model))
    off = qins.load(tmp_path / "out", quantization_config=qins.QinsConfig(decode_step=False))
    assert not layers_of(off)
    assert "decode_step" not in off.config.quantization_config.to_dict()


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("QINS_DECODE_STEP", "0")
    assert not layers_of(family("Llama"))
    monkeypatch.setenv("QINS_DECODE_STEP", "maybe")
    with pytest.raises(ValueError, match="QINS_DECODE_STEP: expected 0 or 1, got 'maybe'"):
        family("Llama")


@pytest.fixture
def model():
    return family("Llama")


def decoded(model, cache=None, tokens=20, prompt=12):
    """Return the logits of decode steps, with a new cache or continuing a given one."""
    ids, _ = texts(tokens=prompt + tokens)
    with torch.no_grad():
        if cache is None:
            cache = DynamicCache(config=model.config)
            model(ids[:, :prompt], past_key_values=cache, use_cache=True)
        out = [
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(prompt, ids.shape[1])
        ]
    return torch.cat(out, 1)


def test_a_layer_that_is_watched_runs_its_modules(model):
    want = decoded(model)
    calls = []
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *a: calls.append(1))
    assert divergence(decoded(model), want) < 1e-8
    assert len(calls) == 21
    handle.remove()
    decoded(model)
    assert len(calls) == 21


def test_attention_maps_are_the_modules():
    model = family("Llama", attn_implementation="eager")
    want = decoded(model)
    ids, _ = texts(tokens=12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        found = model(
            ids[:, :1], past_key_values=cache, use_cache=True, output_attentions=True, output_hidden_states=True
        )
    assert len(found.hidden_states) == SIZES["num_hidden_layers"] + 1
    assert [a.shape for a in found.attentions] == [(1, 4, 1, 13)] * SIZES["num_hidden_layers"]
    assert divergence(decoded(model), want) < 1e-8


def test_gradients_flow_through_the_modules(model):
    ids, _ = texts(tokens=12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    x = model.get_input_embeddings()(ids[:, :1]).detach().requires_grad_()
    model(inputs_embeds=x, past_key_values=cache, use_cache=True).logits.sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_changed_weights_count(model):
    before = decoded(model)
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight.mul_(1.5)
    got = decoded(model)
    assert divergence(got, before) > 1e-6
    model.model.layers[1].mlp.up_proj = qins.QINSLinear.from_linear(nn.Linear(64, 96, bias=True))
    changed = decoded(model)
    assert all(proved(model))
    without_steps(model)
    assert divergence(changed, decoded(model)) < 1e-8
    model = family("Llama")
    decoded(model)
    model.to(torch.bfloat16)
    assert decoded(model).dtype == torch.bfloat16
    assert all(proved(model))


def test_adapters_run_their_modules(model):
    peft = pytest.importorskip("peft")
    want = decoded(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    got = decoded(tuned)
    assert divergence(got, want) > 1e-9
    assert not any(proved(tuned))


def test_copies(model):
    want = decoded(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(a is not b for a, b in zip(layers_of(model), layers_of(other), strict=True))
        assert divergence(decoded(other), want) < 1e-8
        assert all(proved(other))


def test_caches_that_share_memory_stay_apart(model):
    """Several continuations of one prefix cache, copied or not, and crops of it."""
    ids, _ = texts(tokens=30)
    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=prefix, use_cache=True)
        model(ids[:, 10:11], past_key_values=prefix, use_cache=True)

        def go_on(cache, begin):
            return torch.cat([
                model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(begin, begin + 6)
            ])  # fmt: skip

        want = go_on(copy.deepcopy(prefix), 11), go_on(copy.deepcopy(prefix), 20)
        views = copy.copy(prefix)
        views.layers = [copy.copy(layer) for layer in prefix.layers]
        first = go_on(prefix, 11)
        assert torch.equal(first, want[0])
        assert torch.equal(go_on(views, 20), want[1])
        prefix.crop(-6)
        assert torch.equal(go_on(prefix, 20), want[1])
        assert torch.equal(go_on(pickle.loads(pickle.dumps(prefix)), 11), go_on(copy.deepcopy(prefix), 11))


@pytest.mark.skipif(not COUNTED, reason="NOT RUN: this transformers does not count a StaticCache's tokens")
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("prompt", [4, 12])  # of sliding windows a half, and more than all
@pytest.mark.parametrize(
    ("name", "batch", "padding"), [("Llama", 1, 0), ("Qwen3", 3, 3), ("Gemma2", 1, 0), ("GptOss", 3, 3)]
)
def test_static_caches(name, batch, padding, prompt, at_once):
    """Steps write to the cache's own tensors, also the last token; a full window takes one token at a time."""
    model = family(name)
    ids, mask = texts(batch, padding=padding)

    def run():
        cache = StaticCache(model.config, max_cache_len=ids.shape[1])
        first = logits(model, ids[:, :12], mask, cache=cache)
        where = [layer.keys.data_ptr() for layer in cache.layers]
        for layer in layers_of(model):
            if layer._qins_step:
                layer._qins_step._proved.clear()
        found = logits(model, ids, mask, prompt, at_once, cache) if not cache.reset() else first
        assert [layer.keys.data_ptr() for layer in cache.layers] == where
        full = [layer for layer in cache.layers if type(layer) is StaticLayer]
        assert all(int(layer.cumulative_length) == ids.shape[1] for layer in full)
        counts = [(int(layer.cumulative_length), getattr(layer, "cumulative_length_int", 0)) for layer in cache.layers]
        return found, [t for layer in cache.layers for t in (layer.keys, layer.values)], counts

    got, states, counts = run()
    of_window = {(4, 1): 2, (4, 4): 1, (12, 1): 1, (12, 4): 0}[prompt, at_once]  # kinds of calls: with room or without
    layers = StaticCache(model.config, 8).layers
    assert proved(model) == [1 if type(layer) is StaticLayer else of_window for layer in layers]
    without_steps(model)
    want, kept, counted = run()
    assert counts == counted
    assert divergence(got, want) < 1e-8
    for a, b in zip(states, kept, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.skipif(not COUNTED, reason="NOT RUN: this transformers does not count a StaticCache's tokens")
@pytest.mark.parametrize("prompt", [4, 12])  # of sliding windows a half, and more than all
@torch.no_grad()
def test_what_is_not_compared_is_in_a_static_cache_once(prompt):
    """A first step whose result is NaN leaves a cache as the modules make it."""
    model = family("Gemma2")
    ids, mask = texts()
    x = model.get_input_embeddings()(ids[:, prompt : prompt + 1])
    x[..., 3] = float("nan")

    def run():
        cache = StaticCache(model.config, max_cache_len=ids.shape[1])
        logits(model, ids[:, :prompt], mask, prompt, cache=cache)
        assert model(inputs_embeds=x, past_key_values=cache, use_cache=True).logits.isnan().all()
        return [
            {n: v for n, v in vars(layer).items() if "cumulative" in n or n in ("keys", "values")}
            for layer in cache.layers
        ]

    got = run()
    assert proved(model) == [0] * len(got)
    without_steps(model)
    for a, b in zip(got, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.skipif(not COUNTED, reason="NOT RUN: this transformers does not count a StaticCache's tokens")
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generate_with_a_static_cache(how):
    model = family("Llama", initializer_range=0.2)
    ids, mask = texts(2, tokens=10)
    arguments = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **how}
    got = model.generate(ids, cache_implementation="static", **arguments)
    assert all(proved(model))
    without_steps(model)
    assert torch.equal(got, model.generate(ids, cache_implementation="static", **arguments))


@pytest.mark.skipif(not COUNTED, reason="NOT RUN: this transformers does not count a StaticCache's tokens")
@torch.no_grad()
def test_a_full_static_cache(model):
    """It has the modules' error, and nothing is written beyond its memory."""
    ids, mask = texts(tokens=20)
    cache = StaticCache(model.config, max_cache_len=19)
    logits(model, ids[:, :19], mask[:, :19], cache=cache)
    kept = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises((IndexError, RuntimeError)):
        model(ids[:, 19:], past_key_values=cache)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(kept, cache.layers, strict=True))


@pytest.mark.skipif(not COUNTED, reason="NOT RUN: this transformers does not count a StaticCache's tokens")
@torch.no_grad()
def test_a_static_cache_without_a_mask(model):
    """The modules then attend to what is not written yet; that is no reason to drop the step."""
    ids, mask = texts(tokens=13)
    cache = StaticCache(model.config, max_cache_len=20)
    logits(model, ids, mask, cache=cache)
    layer, x = model.model.layers[0], torch.randn(1, 1, SIZES["hidden_size"])
    rotation, other = model.model.rotary_emb(x, torch.tensor([[13]])), copy.deepcopy(cache)
    got = layer(x, attention_mask=None, past_key_values=cache, position_embeddings=rotation)
    assert all(proved(model))
    without_steps(model)
    want = layer(x, attention_mask=None, past_key_values=other, position_embeddings=rotation)
    assert torch.allclose(got, want, atol=1e-5)


def test_other_caches_run_the_modules(model):
    class Other(DynamicCache):
        pass

    ids, _ = texts(tokens=10)
    want = model.generate(ids, max_new_tokens=10, do_sample=False)
    for layer in layers_of(model):
        layer._qins_step._proved.clear()
    found = model.generate(ids, max_new_tokens=10, do_sample=False, past_key_values=Other(config=model.config))
    assert torch.equal(found, want)
    assert not any(proved(model))


@pytest.mark.parametrize("codecs", [("log8", "log8"), ("log5", "log4")])
def test_the_tokens_of_a_quantized_cache(model, codecs):
    """Steps and modules write to one cache; copies, crops, and beams that are reordered keep their own tokens."""
    ids, _ = texts(tokens=30)

    def new():
        return qins.QINSCache(model.config, k_codec=codecs[0], v_codec=codecs[1])

    def of_prefix():
        cache = new()
        with torch.no_grad():
            model(ids[:, :10], past_key_values=cache, use_cache=True)
        return cache

    decoded(model, of_prefix(), tokens=1, prompt=10)  # which runs the modules, too, whose rounding differs
    prefix = of_prefix()
    one, other = copy.deepcopy(prefix), copy.deepcopy(prefix)
    want = decoded(model, one, prompt=10)
    assert one.get_seq_length() == 30
    assert torch.equal(decoded(model, prefix, prompt=10), want)
    assert torch.equal(decoded(model, other, tokens=7, prompt=10), want[:, :7])
    other.crop(-7)
    assert other.get_seq_length() == 10
    assert torch.equal(decoded(model, other, prompt=10), want)
    for layer in layers_of(model):
        layer._qins_step._proved.clear()
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    beams = model.generate(ids, past_key_values=new(), **options)
    assert all(proved(model))
    without_steps(model)
    assert torch.equal(beams, model.generate(ids, past_key_values=new(), **options))
    assert divergence(decoded(model, of_prefix(), prompt=10), want) < 1e-6


@pytest.mark.parametrize(
    "codecs", [("float16", "log8"), ("log8", "golden"), ("golden", "float16"), ("log6", "log4"), ("float16", "log5")]
)
def test_states_that_a_quantized_cache_refuses(model, codecs):
    """The modules' own error, and nothing is added."""
    ids, _ = texts(tokens=12)
    cache = qins.QINSCache(model.config, k_codec=codecs[0], v_codec=codecs[1])
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        x = model.get_input_embeddings()(ids[:, :1]).clone()
        want = model(inputs_embeds=x, past_key_values=copy.deepcopy(cache), use_cache=True).logits
        x[..., 3] = float("nan")
        with pytest.raises(ValueError, match="_states: expected finite values, got 32 NaN or infinite"):
            model(inputs_embeds=x, past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 13
        again = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
    assert torch.equal(again, want)


@torch.no_grad()
def test_keys_too_large_for_float16(model):
    bias = model.model.layers[0].self_attn.k_proj.bias
    ids, _ = texts(tokens=12)
    cache = qins.QINSCache(model.config)
    for token in (0, 1):
        model(ids[:, token : token + 1], past_key_values=cache, use_cache=True)
    assert all(proved(model))
    bias.fill_(1e5)
    with pytest.raises(ValueError, match="key_states: expected finite values, got magnitudes up to"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 2


def test_another_attention_is_another_step(model):
    want = decoded(model)
    model.set_attn_implementation("eager")
    assert divergence(decoded(model), want) < 1e-8
    assert all(layer._qins_step.about._implementation == "eager" for layer in layers_of(model))


def test_threads_decode_at_once(model):
    """Threads share one model; each has its own cache."""
    model.to(torch.bfloat16)
    want = decoded(model, tokens=40)
    decoded(model, tokens=2)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: decoded(model, tokens=40), range(12))]
    assert all(torch.equal(f[:, 1:], found[0][:, 1:]) for f in found)
    assert (found[0] - want).norm() < 0.05 * want.norm()


def turn_wrongly(monkeypatch):
    right = decoding.rotation_for

    def turned_back(*arguments):
        (cos, sin, *sizes), owner = right(*arguments)
        return (sin, cos, *sizes), owner

    monkeypatch.setattr(decoding, "rotation_for", turned_back)


@pytest.mark.parametrize("codec", [None, "log8", "log4"])
@pytest.mark.parametrize("wrong", ["activation", "rotation"])
def test_a_step_that_differs_is_dropped(model, monkeypatch, caplog, wrong, codec):
    ids, mask = texts(tokens=20)

    def steps(model):
        cache = None if codec is None else qins.QINSCache(k_codec=codec, v_codec=codec)
        return logits(model, ids, mask, cache=cache)

    without_steps(model)
    want = steps(model)
    other = family("Llama")
    if wrong == "activation":
        monkeypatch.setattr(layer_description, "activation_of", lambda mlp: 1)  # gelu instead of silu
    else:
        turn_wrongly(monkeypatch)
    caplog.set_level(logging.INFO, "qins")
    got = steps(other)
    assert not any(proved(other))
    assert "layer 0 decodes with its own modules: its results differ" in caplog.text
    assert divergence(got, want) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_of_large_elements_is_no_difference(dtype, monkeypatch):
    """In bfloat16 it is more than all that a layer adds to the other elements, in which a wrong step still shows."""
    for wrong in False, True:
        model = family("Llama")
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 5] = 4000.0 * model.model.embed_tokens.weight.std()
        model.to(dtype)
        if wrong:
            turn_wrongly(monkeypatch)
        logits(model, *texts(tokens=20))
        assert sum(n > 0 for n in proved(model)) == (0 if wrong else 4)


@pytest.mark.skipif(not COUNTED, reason="NOT RUN: this transformers does not count a StaticCache's tokens")
@pytest.mark.parametrize("prompt", [4, 12])
def test_a_static_cache_after_a_step_that_differs(monkeypatch, prompt):
    """It is what the modules make of it, with room in the sliding window or without."""
    ids, mask = texts(tokens=20)

    def run(model):
        cache = StaticCache(model.config, max_cache_len=20)
        found = logits(model, ids, mask, prompt, cache=cache)
        return found, [t for layer in cache.layers for t in (layer.keys, layer.values)]

    model, other = family("Mistral"), family("Mistral")
    without_steps(model)
    monkeypatch.setattr(layer_description, "activation_of", lambda mlp: 1)  # gelu instead of silu
    (want, kept), (got, states) = run(model), run(other)
    assert not any(proved(other))
    assert divergence(got, want) < 1e-8
    for a, b in zip(states, kept, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_layers_of_other_kinds_keep_their_modules(caplog):
    caplog.set_level(logging.INFO, "qins")
    torch.manual_seed(0)
    config = transformers.Starcoder2Config(**SIZES)
    model = converted(transformers.Starcoder2ForCausalLM(config).eval())
    decoded(model)
    assert not any(proved(model))
    assert "layer 3 decodes with its own modules: a Starcoder2DecoderLayer" in caplog.text
    partly = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    qins.convert(partly, exclude=("lm_head", "*.layers.2.mlp.*"))
    decoded(partly)
    assert [bool(p) for p in proved(partly)] == [True, True, False, True]


def test_nan_stays_nan(model):
    ids, _ = texts(tokens=12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        x = model.get_input_embeddings()(ids[:, :1]).clone()
        x[..., 3] = float("nan")
        assert model(inputs_embeds=x, past_key_values=cache, use_cache=True).logits.isnan().all()
    fresh = family("Llama")
    cache = DynamicCache(config=fresh.config)
    with torch.no_grad():  # the first decode step has a NaN
        fresh(ids, past_key_values=cache, use_cache=True)
        assert fresh(inputs_embeds=x, past_key_values=cache, use_cache=True).logits.isnan().all()
    decoded(fresh)
    assert all(proved(fresh))
