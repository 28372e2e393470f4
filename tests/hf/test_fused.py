"""RMS norms, gated MLPs and rotary embedding by the core where layers run their own forward."""

from __future__ import annotations

import copy
import logging
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import qins

transformers = pytest.importorskip("transformers")
from tiny import COMMON  # noqa: E402

from qins import _core  # noqa: E402
from qins.hf import fused as fusing  # noqa: E402
from qins.hf import layer_description  # noqa: E402

pytestmark = pytest.mark.once

IDS = torch.arange(3, 103).reshape(2, 50)  # more than a decode step takes
ROUNDING = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}  # of logits, over all layers
FAMILIES = {
    "Llama": {"mlp_bias": True}, "Qwen3": {"head_dim": 24, "num_key_value_heads": 2}, "Gemma2": {"head_dim": 16},
    "Phi3": {}, "Olmo2": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
}  # fmt: skip


def tiny(name="Llama", dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **FAMILIES[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, p in model.named_parameters():
        if "norm" in key:
            nn.init.normal_(p, 0.1 if name == "Gemma2" else 0.8, 0.2)
    model = model.to(dtype)
    qins.convert(model, exclude=())
    return model


def fused(model):
    return [m for m in model.modules() if m.__dict__.get("_qins_fused") is not None]


def plain(model):
    other = copy.deepcopy(model)
    for module in other.modules():
        module.__dict__.pop("_qins_fused", None)
    return other


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def close(a, b):
    return (a - b).norm() < 1e-4 * b.norm()


@pytest.fixture
def float_products():
    """Products in float32: fixed point turns differences in the last bits of activations into some of 1e-4."""
    _core.force_way("FLOAT_PANELS")
    yield
    _core.force_way(None)


@pytest.mark.usefixtures("float_products")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", FAMILIES)
def test_same_answers(name, dtype):
    """Rounding once per norm is at least as near to float32's result as rounding after each operation."""
    model = tiny(name, dtype)
    kinds = {type(m).__name__.removeprefix(name) for m in fused(model)}
    assert kinds == {"RMSNorm", "MLP"}
    got, want = logits(model).float(), logits(plain(model)).float()
    assert not torch.equal(got, want)
    assert (got - want).norm() < ROUNDING[dtype] * want.norm()
    assert torch.equal(got, logits(model).float())  # a first call's result is that of later ones
    assert len(fused(model)) == len([m for m in model.modules() if type(m).__name__.endswith(("RMSNorm", "MLP"))])
    norm, x = model.model.norm, torch.randn(3, COMMON["hidden_size"]).to(dtype)
    exact = plain(norm).float()(x.float())
    with torch.no_grad():
        assert (norm(x).float() - exact).norm() <= (plain(norm)(x).float() - exact).norm() + 1e-6 * exact.norm()


def rotation(model):
    return sys.modules[type(model).__module__].apply_rotary_pos_emb


def rotations(dtype):
    """Queries, keys, cosines and sines: as models with separate and with fused projections have them, and others."""
    for batch, heads, tokens, dim, shared in ((2, 3, 50, 64, True), (3, 1, 7, 10, False), (1, 2, 1, 256, True)):
        both = torch.randn(batch, tokens, heads + 2, dim).to(dtype)
        cos, sin = torch.randn(2, 1 if shared else batch, tokens, dim).to(dtype)
        q, k = both[:, :, :heads].transpose(1, 2), both[:, :, heads : heads + 1].transpose(1, 2)
        yield q, k, cos, sin
        yield q.contiguous(), k.contiguous(), cos, sin
        yield q[..., ::2], k[..., ::2], cos[..., ::2], sin[..., ::2]
        yield q, k, cos[:, :1], sin[:, :1]
        yield q[:0], k, cos[:1], sin[:1]
        yield q, k, cos.float(), sin.float()


@pytest.mark.parametrize("name", FAMILIES)
def test_rotation_is_bit_for_bit_the_models(name, monkeypatch):
    model, called = tiny(name), []
    if not hasattr(rotation(model), "__wrapped__"):
        assert hasattr(model.model.layers[0].self_attn, "rotary_fn")
        pytest.skip("NOT RUN: this transformers keeps the function in its modules")
    own, core = rotation(model).__wrapped__, fusing._core.rotate_at
    monkeypatch.setattr(fusing._core, "rotate_at", lambda *args: called.append(core(*args)))
    with torch.no_grad():
        logits(model)
        assert len(called) == 2 * len(model.model.layers)
        for dtype in ROUNDING:
            for given in rotations(dtype):
                for got, want in zip(rotation(model)(*given), own(*given), strict=True):
                    assert torch.equal(got, want)
    before = len(called)
    given = [t.requires_grad_() for t in next(rotations(torch.float32))]
    sum(t.sum() for t in rotation(model)(*given)).backward()
    assert given[0].grad.norm() > 0
    assert len(called) == before


def test_other_rotations_keep_their_operations(monkeypatch):
    """Neighbours instead of halves; a function that takes something else."""
    here = sys.modules[__name__]
    for own in (transformers.models.cohere.modeling_cohere.apply_rotary_pos_emb, lambda x: x):
        monkeypatch.setattr(here, "apply_rotary_pos_emb", own, raising=False)
        fusing._fuse_rotation(type("Attention", (nn.Module,), {"__module__": __name__})())
        assert here.apply_rotary_pos_emb is own


def test_threads_change_nothing():
    model = tiny()
    found = []
    for n in (1, 2, 5):
        qins.set_num_threads(n)
        found.append(logits(model))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_changed_norm_counts():
    model = tiny()
    logits(model)
    norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        norm.weight.mul_(2.0)
    assert close(logits(model), logits(plain(model)))
    norm.weight = nn.Parameter(torch.full_like(norm.weight, 0.5))
    assert close(logits(model), logits(plain(model)))


def test_hooks_and_gradients():
    """Projections and norms remain modules that can be watched and replaced; an activation that is watched runs."""
    model = tiny()
    mlp, seen = model.model.layers[0].mlp, []
    logits(model)
    for module in (mlp, mlp.gate_proj, mlp.down_proj, mlp.act_fn, model.model.norm):
        module.register_forward_hook(lambda m, *_: seen.append(m))
    logits(model)
    assert len(seen) == 5
    x = torch.randn(1, 20, COMMON["hidden_size"], requires_grad=True)
    mlp(model.model.norm(x)).sum().backward()
    assert x.grad.norm() > 0


def test_inputs_of_other_kinds():
    model = tiny(dtype=torch.bfloat16)
    norm = model.model.norm
    with torch.no_grad():
        wide = torch.randn(2, 3, 2 * COMMON["hidden_size"]).bfloat16()
        for x in (wide[..., ::2], wide[..., : COMMON["hidden_size"]], wide[:0, :, : COMMON["hidden_size"]]):
            assert torch.allclose(norm(x), plain(norm)(x), rtol=1e-2)
            assert norm(x).shape == x.shape
        assert norm(wide[..., : COMMON["hidden_size"]].float()).dtype == torch.float32
        assert torch.equal(norm(hidden_states=wide[..., ::2]), plain(norm)(wide[..., ::2]))
        with pytest.raises(RuntimeError):
            norm(wide)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    model = tiny()
    model.model.embed_tokens = nn.Embedding.from_pretrained(torch.randn(COMMON["vocab_size"], COMMON["hidden_size"]))
    model.model.embed_tokens.weight[5, 3] = value
    for _ in range(2):
        got, want = logits(model), logits(plain(model))
        assert torch.equal(got.isnan(), want.isnan())
        assert got.isnan().any()
        assert close(got[1], want[1])
        logits(model, IDS[1:])  # after which the gates are known


def test_copies_and_pickles():
    model = tiny()
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(fused(other)) == len(fused(model))
        assert torch.equal(logits(other), want)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert torch.equal(logits(other), want)


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("QINS_DECODE_STEP", "0")
    assert not fused(tiny())


def test_what_differs_keeps_its_operations(monkeypatch, caplog):
    model = tiny()
    monkeypatch.setattr("qins.hf.fused.activation_of", lambda mlp: 1)  # gelu instead of silu
    with caplog.at_level(logging.INFO, "qins"):
        got = logits(model)
    assert "LlamaMLP computes with its own operations: its results differ" in caplog.text
    assert {type(m).__name__ for m in fused(model)} == {"LlamaRMSNorm"}
    assert close(got, logits(plain(model)))
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()
    monkeypatch.undo()
    assert layer_description.activation_of(tiny().model.layers[0].mlp) == 0
    assert close(logits(model), logits(plain(model)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    """torch.compile sees the modules' own operations."""
    model = tiny()
    compiled = torch.compile(lambda x: model.model.layers[0].mlp(model.model.norm(x)), backend="eager", dynamic=dynamic)
    x = torch.randn(1, 20, COMMON["hidden_size"])
    with torch.no_grad():
        layer = plain(model.model)
        assert torch.allclose(compiled(x), layer.layers[0].mlp(layer.norm(x)), atol=1e-5)


def test_traced_and_transformed():
    """Whoever watches torch's dispatcher sees the modules' own operations, and the operators of codes."""
    model = tiny()
    norm, mlp, x = model.model.norm, model.model.layers[0].mlp, torch.randn(3, 5, COMMON["hidden_size"])
    with torch.no_grad():
        norm(x), mlp(x)
        graphs = [str(make_fx(module)(x).graph) for module in (norm, mlp)]
        mapped = torch.func.vmap(norm)(x)
        assert torch.allclose(mapped, norm(x), atol=1e-5)
    assert "rsqrt" in graphs[0]
    assert graphs[1].count("qins.linear") == 3
