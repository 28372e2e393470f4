"""LoRA on quantized models: training, saving, merging, and unsupported uses."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import qins

peft = pytest.importorskip("peft")
from tiny import make, outputs, same_state  # noqa: E402

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already "),
]


def adapted(seed=0, name="llama", codec="log8", **kwargs):
    """Return a quantized model with an adapter that is not zero."""
    base = make(name)
    qins.convert(base, codec)
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False} | kwargs
    return peft.get_peft_model(base, peft.LoraConfig(**options)).eval()


def layer_of(model):
    return model.base_model.model.model.layers[0].mlp.up_proj


@pytest.mark.parametrize("codec", ["log8", "log4"])
def test_training_lowers_the_loss(codec):
    model = adapted(codec=codec, init_lora_weights=True).train()
    codes = {n: b.clone() for n, b in model.named_buffers()}
    ids = torch.arange(3, 43).reshape(2, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(codes[n], b) for n, b in model.named_buffers())


def test_save_and_reload(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    base = make("llama")
    qins.convert(base)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize(("codec", "most"), [("log8", 0.02), ("log4", 0.15)])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(safe, codec, most):
    model = adapted(codec=codec)
    layer = layer_of(model)
    assert type(layer).__name__ == "QINSLoraLinear"
    before = {n: b.clone() for n, b in layer.base_layer.named_buffers()}
    expected, original = outputs(model), outputs(model.get_base_model()) * 0
    with model.disable_adapter():
        original = outputs(model)
    wanted = layer.base_layer.weight + layer.get_delta_weight("default")
    model.merge_adapter(safe_merge=safe)
    assert isinstance(layer.base_layer, qins.QINSLinear)
    error = (layer.base_layer.weight - wanted).norm() / wanted.norm()
    assert 0 < error < most
    merged = outputs(model)
    assert (merged - expected).norm() < 5 * most * (expected - original).norm()
    model.unmerge_adapter()
    assert all(torch.equal(before[n], b) for n, b in layer.base_layer.named_buffers())
    assert torch.equal(outputs(model), expected)


def test_two_adapters_unmerge_exactly():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    layer = layer_of(model)
    before = copy.deepcopy(layer.base_layer)
    wanted = before.weight + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    model.base_model.merge_adapter(["default"])
    model.base_model.merge_adapter(["default", "second"])
    assert (layer.base_layer.weight - wanted).norm() < 0.02 * wanted.norm()
    model.unmerge_adapter()
    assert same_state(layer.base_layer, before)


def test_merge_and_unload():
    model = adapted()
    expected = outputs(model)
    plain = model.merge_and_unload()
    assert isinstance(plain.model.layers[0].mlp.up_proj, qins.QINSLinear)
    assert (outputs(plain) - expected).norm() < 0.1 * expected.norm()


def test_biases_are_merged():
    model = adapted(name="qwen2", lora_bias=True, target_modules=["q_proj"])
    for name, p in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(p)
    expected = outputs(model)
    bias = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias.clone()
    model.merge_adapter()
    assert (outputs(model) - expected).norm() < 0.1 * expected.norm()
    model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias, bias)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        adapted(**kwargs)


@pytest.mark.parametrize("kind", ["IA3Config", "VeraConfig", "LoHaConfig", "OFTConfig", "HRAConfig"])
def test_other_tuners_run_but_do_not_merge(kind):
    """Merging would add to a dequantized copy of the weight, and silently lose what the adapter learned."""
    config = {"target_modules": ["q_proj", "v_proj"]}
    if kind == "IA3Config":
        config |= {"feedforward_modules": []}
    if kind == "OFTConfig":
        config |= {"oft_block_size": 8}
    model = make("llama").eval()
    qins.convert(model)
    expected = outputs(model)
    tuned = peft.get_peft_model(model, getattr(peft, kind)(**config))
    assert outputs(tuned).isfinite().all()
    codes = {n: b.clone() for n, b in tuned.named_buffers() if n.endswith("codes")}
    for merge in (tuned.merge_adapter, tuned.merge_and_unload):
        with pytest.raises(ValueError, match="cannot merge into the codes of a QINSLinear; only LoRA can"):
            merge()
    assert all(torch.equal(b, codes[n]) for n, b in tuned.named_buffers() if n in codes)
    assert torch.equal(outputs(tuned.unload()), expected)


def test_an_adapter_of_embeddings_runs_but_does_not_merge(tmp_path):
    make("llama").save_pretrained(tmp_path)
    load = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=qins.QinsConfig(embeddings=True))
    expected = outputs(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert torch.equal(outputs(tuned), expected)  # an untrained adapter changes nothing
    tuned(torch.arange(3, 23)[None]).logits.square().mean().backward()
    assert tuned.base_model.model.model.embed_tokens.lora_embedding_A["default"].grad.abs().sum() > 0
    with pytest.raises(ValueError, match="cannot merge into the codes of a QINSEmbedding"):
        tuned.merge_and_unload()
    assert torch.equal(outputs(tuned.unload()), expected)


def test_other_models_are_left_alone():
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert type(layer_of(model)) is peft.tuners.lora.layer.Linear


def test_prepare_for_training():
    base = make("llama")
    qins.convert(base)
    codes = base.model.layers[0].mlp.up_proj.scale.clone()
    prepared = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    assert torch.equal(prepared.model.layers[0].mlp.up_proj.scale, codes)
    model = peft.get_peft_model(prepared, peft.LoraConfig(r=2, target_modules="all-linear"))
    model(input_ids=torch.arange(3, 23)[None], labels=torch.arange(3, 23)[None]).loss.backward()


@pytest.mark.long
@pytest.mark.parametrize("order", ["import qins, peft", "import peft, qins"])
def test_the_order_of_imports_does_not_matter(order):
    code = f"{order}\nassert qins.QINSLinear in peft.LoraConfig()._custom_modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
