"""Mixtures of experts: QINSExperts, while loading and in place; only the selected experts' codes are read."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from cases import long_but
from safetensors.torch import load_file, save_file

import qins
from qins.codec import LOG_BITS

transformers = pytest.importorskip("transformers")
from peak import peak_while_loading  # noqa: E402
from tiny import close, outputs, same_state, with_decoded_weights, without_qins  # noqa: E402
from tiny_experts import EXPERTS, MODELS, V5, make, mixtral  # noqa: E402

pytestmark = pytest.mark.once
v5_only = pytest.mark.skipif(not V5, reason="transformers 4 has these experts as linear layers")


def experts_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, qins.QINSExperts)}


@pytest.mark.long
def test_where_qins_is_not_installed(tmp_path):
    """Models are refused even if only their experts are quantized."""
    cases = []
    for name in MODELS:
        for what in ("all", "experts"):
            include = ["*.experts"] if what == "experts" else None
            make(name).save_pretrained(tmp_path / "float")
            cls = type(make(name))
            model = cls.from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig(include=include))
            model.save_pretrained(tmp_path / f"{name} {what}")
            loaded, told = cls.from_pretrained(tmp_path / f"{name} {what}", output_loading_info=True)
            assert not any(told.values()), told
            assert same_state(loaded, model)
            cases.append((cls.__name__, tmp_path / f"{name} {what}"))
    assert without_qins(*cases) == ["refused"] * len(cases)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("codec", long_but(["log8", "log4"], ["log8", "golden", "log9", "log4"]))
def test_matrix(tmp_path, name, codec):
    model = make(name)
    cls = type(model)
    model.save_pretrained(tmp_path / "float")
    quantized = cls.from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig(codec=codec))
    assert len(experts_of(quantized)) == 2
    assert not any(p.ndim == 3 for p in quantized.parameters())
    assert close(outputs(quantized), outputs(with_decoded_weights(model, quantized)))
    # two generations
    quantized.save_pretrained(tmp_path / "one")
    one = cls.from_pretrained(tmp_path / "one")
    assert same_state(one, quantized)
    one.save_pretrained(tmp_path / "two")
    two = qins.load(tmp_path / "two")
    assert same_state(two, quantized)
    assert close(outputs(two), outputs(quantized))
    ids = torch.arange(3, 12)[None]
    kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(two.generate(ids, **kwargs), quantized.generate(ids, **kwargs))
    # in place
    converted = copy.deepcopy(model)
    report = qins.convert(converted, codec, exclude=["lm_head", "*.gate", "*.router", "*.shared_expert_gate"])
    assert same_state(converted, quantized)
    least = {"log8": 44.0, "golden": 35.0, "log9": 35.0, "log4": 19.0}[codec]
    assert all(m.snr_db > least for m in report.converted if "experts" in m.name)
    # what is on the disk
    found = qins.inspect(tmp_path / "one")
    assert not found.problems
    stacks = [f"{n}.{s}" for n, m in experts_of(quantized).items() for s in m.shapes]
    # Mixtral's checkpoints have another name for a layer's experts
    assert sorted(e.name.replace(".block_sparse_moe.", ".mlp.") for e in found.layers if e.is_stack) == sorted(stacks)
    errors = qins.inspect(tmp_path / "one", tmp_path / "two").errors
    assert all(e.max_error == 0.0 for e in errors)
    assert {e.name for e in found.layers} <= {e.name for e in errors}
    memory = qins.memory_report(quantized)
    assert not memory.problems
    assert memory.by("role")["codes"] * 8 // LOG_BITS.get(codec, 8) == sum(
        m.in_features * m.out_features if isinstance(m, qins.QINSLinear) else sum(np.prod(s) for s in m.shapes.values())
        for m in quantized.modules()
        if isinstance(m, (qins.QINSLinear, qins.QINSExperts))
    )
    # and back
    assert same_state(copy.deepcopy(two).dequantize(), with_decoded_weights(model, quantized))


@pytest.mark.parametrize("name", MODELS)
def test_each_expert_is_encoded_by_itself(name):
    original = next(m for m in make(name).modules() if qins.nn.projections(m))
    new = qins.QINSExperts.from_experts(original, "log8", {s: 32 for s in qins.nn.projections(original)})
    for stack, (count, *shape) in new.shapes.items():
        weights = getattr(original, stack).detach()
        for i in range(count):
            alone = qins.encode(weights[i].T if new.is_transposed else weights[i], group_size=32)
            assert alone.shape == tuple(shape)
            assert all(np.array_equal(new.encoded(stack, i).fields[n], f) for n, f in alone.fields.items())


@v5_only
def test_experts_that_cannot_be_packed_get_log8(tmp_path):
    torch.manual_seed(0)
    model = mixtral(intermediate_size=100)
    model.save_pretrained(tmp_path / "float")
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig("log5"))
    report = qins.convert(model, "log5", exclude=["lm_head", "*.gate"])
    assert same_state(model, quantized)
    assert {m.codec for m in experts_of(model).values()} == {"log8"}  # the projections of a module have one codec
    assert model.model.layers[0].self_attn.q_proj.codec == "log5"
    for told in (report, quantized.hf_quantizer.report):
        assert sum("experts" in m.name and "100 inputs" in m.note for m in told.converted) == 4
    quantized.save_pretrained(tmp_path / "out")
    assert same_state(qins.load(tmp_path / "out"), quantized)


@v5_only
@torch.no_grad()
def test_only_the_experts_that_tokens_go_to_are_read():
    original = next(m for m in make("mixtral").modules() if hasattr(m, "is_transposed"))
    new = qins.QINSExperts.from_experts(original, "log8", {"gate_up_proj": None, "down_proj": None})
    x, weights = torch.randn(3, 64), torch.tensor([[0.75, 0.25]] * 3)
    index = torch.tensor([[2, 0], [0, 2], [2, 0]])
    y = new(x, index, weights)
    assert float((y - original(x, index, weights)).norm() / y.norm()) < 0.02
    for stack in new.shapes:
        for field in ("codes", "scale"):
            new.get_buffer(f"{stack}_{field}")[[1, 3]] = 77
    assert torch.equal(new(x, index, weights), y)
    # an index beyond the last expert masks a choice
    masked = new(x, torch.tensor([[2, EXPERTS]] * 3), weights)
    assert torch.allclose(masked, new(x, torch.tensor([[2, 2]] * 3), torch.tensor([[0.75, 0.0]] * 3)), atol=1e-6)
    # a token alone gives the same result as among others, within the difference of two kernels
    assert float((new(x[1:2], index[1:2], weights[1:2]) - y[1:2]).norm() / y[1:2].norm()) < 5e-4


@torch.no_grad()
def test_llama4_experts_are_read_once_and_only_for_rows_that_are_not_zero(monkeypatch):
    original = next(m for m in make("llama4").modules() if qins.nn.projections(m))
    new = qins.QINSExperts.from_experts(original, "log8", {"gate_up_proj": None, "down_proj": None})
    x = torch.randn(EXPERTS, 3, 64)
    x[1] = 0
    x[2, 1] = 0
    y = new(x.flatten(0, 1))
    assert float((y - original(x.flatten(0, 1))).norm() / y.norm()) < 0.02
    for stack in new.shapes:
        new.get_buffer(f"{stack}_codes")[1] = 77
    assert torch.equal(new(x.flatten(0, 1)), y)
    runs = qins.nn.experts._runs
    counts = []
    monkeypatch.setattr(qins.nn.experts, "_runs", lambda *a: counts.append(len(list(runs(*a)))) or runs(*a))
    assert torch.equal(new(x.flatten(0, 1)), y)
    assert counts == [EXPERTS - 1, EXPERTS - 1]


def test_operators():
    names = ("codes", "scale", "mu")
    encoded = [qins.encode(w) for w in torch.randn(3, 24, 40)]
    fields = [torch.stack([torch.from_numpy(np.asarray(e.fields[n])) for e in encoded]) for n in names]
    experts = torch.tensor([0, 0, 2, 2, 2])
    x = torch.randn(5, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.qins.grouped_linear.default, (x, experts, fields, "log8", 0))
    y = torch.ops.qins.grouped_linear(x, experts, fields, "log8", 0)
    dense = torch.stack([torch.from_numpy(e.decode()) for e in encoded])
    assert torch.allclose(y, torch.einsum("sk,snk->sn", x, dense[experts]), rtol=1e-3, atol=2e-3)
    g = torch.randn(5, 24)
    (got,) = torch.autograd.grad(y, x, g)
    assert torch.allclose(got, torch.einsum("sn,snk->sk", g, dense[experts]), rtol=1e-3, atol=2e-3)


@v5_only
def test_compile_without_a_graph_break(tmp_path):
    make("mixtral").save_pretrained(tmp_path)
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path, quantization_config=qins.QinsConfig())
    assert close(outputs(torch.compile(model, fullgraph=True, backend="eager")), outputs(model))


def test_casts_copies_and_pickles():
    model = make("gpt_oss")
    qins.convert(model)
    bits = next(iter(experts_of(model).values())).down_proj_mu.clone()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_state(other, model)
        assert torch.equal(outputs(other), outputs(model))
    half = copy.deepcopy(model).bfloat16()
    (name, experts), *_ = experts_of(half).items()
    assert torch.equal(experts.down_proj_mu, bits)
    assert experts.weight("down_proj").dtype == torch.bfloat16
    assert experts.gate_up_proj_bias.dtype == torch.bfloat16
    assert float((outputs(half) - outputs(model)).norm() / outputs(model).norm()) < 0.05
    state = model.state_dict()
    state[f"{name}.down_proj_codes"] = state[f"{name}.down_proj_codes"].float()
    with pytest.raises(TypeError, match=r"down_proj_codes: expected dtype torch\.uint8"):
        model.load_state_dict(state)


@v5_only
def test_faults(tmp_path):
    model = make("mixtral")
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.experts.down_proj.data[2, 5, 7] = float("nan")
    before = copy.deepcopy(broken.state_dict())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.down_proj"):
        qins.convert(broken)
    assert broken.state_dict().keys() == before.keys()
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises((ValueError, RuntimeError), match="(?i)nan|no weight|conversion"):
        type(model).from_pretrained(tmp_path / "nan", quantization_config=qins.QinsConfig())
    # an expert is missing from the file
    model.save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    state = load_file(file)
    del state["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="no weight for|conversion"):
        type(model).from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig())
    # experts that transformers 4 wrote as linear layers
    qins.convert(model)
    model.save_pretrained(tmp_path / "codes")
    path = tmp_path / "codes" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"] |= {"model.layers.0.block_sparse_moe.experts.0.w1": ["log8", 128]}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="versions 4 and 5 keep experts in different modules"):
        type(model).from_pretrained(tmp_path / "codes")


@v5_only
def test_what_is_quantized(tmp_path):
    make("mixtral").save_pretrained(tmp_path)
    config = qins.QinsConfig(exclude=["*.layers.0.mlp.experts"], overrides={"*.mlp.experts": {"group_size": 32}})
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert list(experts_of(model)) == ["model.layers.1.mlp.experts"]
    assert experts_of(model)["model.layers.1.mlp.experts"].group_sizes == {"gate_up_proj": 32, "down_proj": 32}
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32
    assert any("experts" in s.name for s in model.hf_quantizer.report.skipped)
    model.save_pretrained(tmp_path / "out")
    assert same_state(transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out"), model)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 1),
    reason="transformers 5.0 puts the floats together",
)
def test_peak_memory_while_loading(tmp_path):
    """400 MB of float32 experts: the peak is codes and other tensors, one expert's largest matrix, and 60 MiB."""
    mixtral(hidden_size=1024, intermediate_size=2048, num_local_experts=8).save_pretrained(tmp_path)
    small = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}  # fmt: skip
    peak, held = peak_while_loading("MixtralForCausalLM", small, tmp_path)
    assert peak < held + 1024 * 4096 * 4 + (60 << 20)
