"""transformers: quantization while loading, and saving and loading codes, on tiny models of many architectures."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import qins
import qins.files

transformers = pytest.importorskip("transformers")
from peak import peak_while_loading  # noqa: E402
from tiny import (  # noqa: E402
    COMMON,
    MODELS,
    close,
    llama,
    make,
    outputs,
    same_state,
    with_decoded_weights,
    without_qins,
)

from qins.hf.expecting import bytes_to_load  # noqa: E402

pytestmark = pytest.mark.once


def test_bytes_to_load_has_tied_weights_once():
    with torch.device("meta"):
        tied = llama(tied=True)
        tied.lm_head.weight = nn.Parameter(torch.empty(160, 64))  # as it is while a checkpoint loads
    tensors = (*tied.named_parameters(), *tied.named_buffers())
    assert bytes_to_load(tied) == sum(t.nbytes for name, t in tensors if name != "lm_head.weight")


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    model = make(request.param)
    model.save_pretrained(tmp_path / "float")
    return model, tmp_path


def test_memory_is_checked_first(saved, monkeypatch):
    """With as much as the loaded model takes, it loads; with far less, it says so. Floats to quantize, and codes."""
    model, path = saved
    cls, config = type(model), qins.QinsConfig()
    loaded = cls.from_pretrained(path / "float", quantization_config=config)
    loaded.save_pretrained(path / "codes")
    tensors = {id(t): t.nbytes for t in [*loaded.parameters(), *loaded.buffers()]}
    for source, given in (("float", {"quantization_config": config}), ("codes", {})):
        with monkeypatch.context() as patch:
            patch.setattr("qins.system.machine.available_bytes", lambda swap: sum(tensors.values()))
            cls.from_pretrained(path / source, **given)
            patch.setattr("qins.system.machine.available_bytes", lambda swap: 1000)
            with pytest.raises(MemoryError, match=r"loading it: needs [\d,]+ bytes of memory, 1,000 are available"):
                cls.from_pretrained(path / source, **given)


@pytest.mark.parametrize(
    ("codec", "most"), [("log8", 0.1), ("log4", 0.4), pytest.param("golden", 0.1, marks=pytest.mark.long)]
)
def test_matrix(saved, codec, most):
    model, path = saved
    cls = type(model)
    quantized = cls.from_pretrained(path / "float", quantization_config=qins.QinsConfig(codec=codec))
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, qins.QINSLinear)}
    floats = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, transformers.pytorch_utils.Conv1D))]
    assert len(layers) == len(floats) - 1  # the output embedding is not quantized
    assert all(m.codec == codec for m in layers.values())
    assert close(outputs(quantized), outputs(with_decoded_weights(model, quantized)))
    assert float((outputs(quantized) - outputs(model)).norm() / outputs(model).norm()) < most
    # in-process conversion gives the same codes
    if cls is not transformers.GPT2LMHeadModel:
        converted = copy.deepcopy(model)
        qins.convert(converted, codec, exclude=[n for n in floats if n not in layers])
        assert same_state(converted, quantized)
    # two generations of saving and loading
    quantized.save_pretrained(path / "one")
    one = cls.from_pretrained(path / "one")
    assert same_state(one, quantized)
    assert close(outputs(one), outputs(quantized))
    one.save_pretrained(path / "two")
    two = qins.load(path / "two")
    assert type(two) is cls
    assert same_state(two, quantized)
    assert (path / "one" / "config.json").read_text() == (path / "two" / "config.json").read_text()
    if quantized.can_generate():
        ids = torch.arange(3, 12)[None]
        kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(two.generate(ids, **kwargs), quantized.generate(ids, **kwargs))
    report = qins.inspect(path / "one")
    assert len(report.layers) == len(layers)
    assert not report.problems


@pytest.fixture
def tiny(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "float")
    return model, tmp_path


def load(path, **kwargs):
    return transformers.LlamaForCausalLM.from_pretrained(path, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(tiny, dtype):
    _, path = tiny
    quantized = load(path / "float", quantization_config=qins.QinsConfig(), dtype=dtype)
    layer = quantized.model.layers[0].mlp.up_proj
    assert layer.scale.dtype == torch.float32
    assert layer.weight.dtype == dtype
    assert quantized.lm_head.weight.dtype == dtype
    quantized.save_pretrained(path / "out")
    again = load(path / "out", dtype=dtype)
    assert same_state(again, quantized)
    # codes loaded in another dtype keep the bits of their scales
    other = load(path / "out", dtype=torch.float32)
    assert torch.equal(other.model.layers[0].mlp.up_proj.scale, layer.scale)
    assert torch.isfinite(outputs(quantized)).all()


def test_sharded(tiny):
    _, path = tiny
    quantized = load(path / "float", quantization_config=qins.QinsConfig())
    quantized.save_pretrained(path / "out", max_shard_size="30KB")
    assert len(list((path / "out").glob("*.safetensors"))) > 3
    assert same_state(load(path / "out"), quantized)


def test_other_heads(tiny):
    _, path = tiny
    quantized = load(path / "float", quantization_config=qins.QinsConfig())
    quantized.save_pretrained(path / "out")
    base = transformers.LlamaModel.from_pretrained(path / "out")
    assert same_state(base, quantized.model)
    headed = transformers.LlamaForSequenceClassification.from_pretrained(path / "out", num_labels=3)
    assert same_state(headed.model, quantized.model)
    assert type(headed.score) is nn.Linear
    base.save_pretrained(path / "base")
    assert same_state(load(path / "base").model, quantized.model)


def test_what_is_quantized(tiny):
    _, path = tiny
    config = qins.QinsConfig(
        exclude=["*.k_proj"], modules_to_not_convert=["v_proj"], group_size=32,
        overrides={
            "*.down_proj": {"codec": "golden"}, "*.up_proj": {"group_size": None}, "*.0.*.o_proj": {"codec": "log6"},
            "*.o_proj": {"codec": "log5", "group_size": 64},
        },
    )  # fmt: skip
    quantized = load(path / "float", quantization_config=config)
    layer = quantized.model.layers[1]
    assert type(layer.self_attn.k_proj) is type(layer.self_attn.v_proj) is nn.Linear
    assert (layer.self_attn.q_proj.codec, layer.self_attn.q_proj.group_size) == ("log8", 32)
    assert layer.mlp.down_proj.codec == "golden"
    assert layer.mlp.up_proj.group_size is None
    packed = [(m.self_attn.o_proj.codec, m.self_attn.o_proj.group_size) for m in quantized.model.layers]
    assert packed == [("log6", 32), ("log5", 64)]
    quantized.save_pretrained(path / "out")
    assert same_state(load(path / "out"), quantized)
    skipped = {s.name: s.reason for s in quantized.hf_quantizer.report.skipped}
    assert skipped["lm_head"] == "the output embedding"
    assert skipped["model.layers.0.self_attn.k_proj"] == "excluded"
    only = load(path / "float", quantization_config=qins.QinsConfig(include=["*.mlp.*"]))
    assert sum(isinstance(m, qins.QINSLinear) for m in only.modules()) == 6


def test_floats_that_transformers_keeps_in_float32(tmp_path):
    make("t5").save_pretrained(tmp_path)
    cls = transformers.T5ForConditionalGeneration
    config = qins.QinsConfig(exclude=["*.wo"])
    floats = cls.from_pretrained(tmp_path, dtype=torch.float16)
    found = cls.from_pretrained(tmp_path, dtype=torch.float16, quantization_config=config).named_parameters()
    kept = {n: p.dtype for n, p in found}
    assert {n for n, dtype in kept.items() if dtype == torch.float32} == {n for n in kept if n.endswith(".wo.weight")}
    assert kept.items() <= {n: p.dtype for n, p in floats.named_parameters()}.items()


def test_layers_that_cannot_be_packed_get_log8(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON | {"intermediate_size": 100})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    quantized = load(tmp_path / "float", quantization_config=qins.QinsConfig("log4"))
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, qins.QINSLinear)}
    codecs = {n.rpartition(".")[2]: (m.codec, m.group_size) for n, m in layers.items()}
    assert codecs.pop("down_proj") == ("log8", 64)
    assert set(codecs.values()) == {("log4", 32)}
    report = str(quantized.hf_quantizer.report)
    note = "model.layers.1.mlp.down_proj: log8 instead of log4: 100 inputs are not a multiple of 8"
    assert note in report
    quantized.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert same_state(again, quantized)
    assert note in str(again.hf_quantizer.report)


def test_config():
    config = qins.QinsConfig(group_size=64, overrides={"a": {"codec": "log9"}}, min_quantized=0.5)
    again = qins.QinsConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    cases = [
        ({"codec": "log7"}, ValueError, "codec: expected one of"),
        ({"grupe_size": 3}, TypeError, "unknown arguments grupe_size"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"codec": "golden", "group_size": 64}, ValueError, "group_size"),
        ({"codec": "log4", "group_size": 48}, ValueError, "group_size: expected 32 or a multiple of 64"),
        ({"format_version": 2}, ValueError, "another version of qins"),
        ({"overrides": {"a": {"bits": 4}}}, ValueError, "bits"),
        ({"min_quantized": 3}, ValueError, "min_quantized"),
        ({"quant_method": "awq"}, ValueError, "quant_method"),
        ({"exclude": [3]}, TypeError, "exclude"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            qins.QinsConfig(**arguments)


def test_slow_group_sizes_warn():
    for kwargs in ({"group_size": 100}, {"overrides": {"*": {"group_size": 100}}}):
        with pytest.warns(UserWarning, match="group_size 100"):
            qins.QinsConfig(**kwargs)
        qins.QinsConfig(**kwargs, modules={})  # of a saved checkpoint


def test_never_silent(tiny, caplog):
    _, path = tiny
    with pytest.raises(ValueError, match="no linear layer"):
        load(path / "float", quantization_config=qins.QinsConfig(include=["nothing"]))
    with pytest.raises(RuntimeError, match=r"less than min_quantized = 0\.9"):
        load(path / "float", quantization_config=qins.QinsConfig(min_quantized=0.9))
    with caplog.at_level(logging.INFO, logger="qins"):
        load(path / "float", quantization_config=qins.QinsConfig(include=["*.q_proj"]))
    assert "% of the parameters are quantized, in 2 layers" in caplog.text
    with pytest.raises(ValueError, match="device_map"):
        load(path / "float", quantization_config=qins.QinsConfig(), device_map={"": "cuda:0"})
    state = load_file(path / "float" / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(state, path / "float" / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)):
        load(path / "float", quantization_config=qins.QinsConfig())
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, path / "float" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"no weight for model\.layers\.0\.mlp\.up_proj"):
        load(path / "float", quantization_config=qins.QinsConfig())


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "version", "truncated"])
def test_damaged_checkpoints(tiny, damage):
    _, path = tiny
    load(path / "float", quantization_config=qins.QinsConfig()).save_pretrained(path / "out")
    file = path / "out" / "model.safetensors"
    state, key = load_file(file), "model.layers.1.mlp.up_proj"
    if damage == "missing":
        del state[f"{key}.codes"]
    elif damage == "shape":
        state[f"{key}.codes"] = state[f"{key}.codes"][:-1].clone()
    elif damage == "nan":
        state[f"{key}.scale"][3] = float("nan")
    save_file(state, file, {"format": "pt"})
    if damage == "version":
        config = json.loads((path / "out" / "config.json").read_text())
        config["quantization_config"]["format_version"] = 7
        (path / "out" / "config.json").write_text(json.dumps(config))
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    message = {"missing": "no codes", "shape": "(?i)shape|mismatch|no codes", "nan": "finite",
               "version": "another version", "truncated": "(?i)safetensor|header|incomplete"}[damage]  # fmt: skip
    with pytest.raises(Exception, match=message):
        load(path / "out")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.codes", "model.norm.weight"])
def test_verify(tiny, monkeypatch, shards, key):
    """Only checksums, on request, detect a flipped bit in a code or a norm."""
    _, path = tiny
    out = path / "out"
    size = "30KB" if shards > 1 else "1GB"
    load(path / "float", quantization_config=qins.QinsConfig(verify=True)).save_pretrained(out, max_shard_size=size)
    config = (out / "config.json").read_text()
    assert '"verify"' not in config
    sound = qins.load(out, verify=True)
    file = next(p for p in out.glob("*.safetensors") if key in load_file(p))
    state = load_file(file)
    state[key] = state[key].clone()
    state[key].view(torch.uint8)[3] ^= 16
    save_file(state, file, {"format": "pt"})
    damaged = load(out)
    assert not torch.equal(damaged.state_dict()[key], sound.state_dict()[key])
    message = rf"{file.name}: {key}: expected checksum [0-9a-f]{{8}}, got [0-9a-f]{{8}}: the file is damaged"
    with pytest.raises(ValueError, match=message):
        qins.load(out, verify=True)
    with pytest.raises(ValueError, match=message):
        load(out, quantization_config=qins.QinsConfig(verify=True))
    with monkeypatch.context() as patch:
        patch.setenv("QINS_VERIFY", "1")
        with pytest.raises(ValueError, match=message):
            load(out)
        patch.setenv("QINS_VERIFY", "0")
        load(out)
        patch.setenv("QINS_VERIFY", "yes")
        with pytest.raises(ValueError, match="QINS_VERIFY: expected 0 or 1, got 'yes'"):
            load(out)
    with pytest.warns(UserWarning, match="quantization_config` from the model will be used"):
        load(out, quantization_config=qins.QinsConfig("golden"))
    told = json.loads(config)
    told["quantization_config"]["checksums"] = None
    (out / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"verify: expected checksums in config\.json, got none"):
        qins.load(out, verify=True)


def test_a_converted_model_saves_and_loads(tiny):
    model, path = tiny
    converted = copy.deepcopy(model)
    qins.convert(converted)
    converted.save_pretrained(path / "out")
    assert same_state(load(path / "out"), converted)
    assert same_state(converted, load(path / "float", quantization_config=qins.QinsConfig()))
    again = copy.deepcopy(converted)
    assert same_state(pickle.loads(pickle.dumps(again)), converted)


def test_dequantize(tiny):
    model, path = tiny
    quantized = load(path / "float", quantization_config=qins.QinsConfig())
    expected = with_decoded_weights(model, quantized)
    back = quantized.dequantize()
    assert not any(isinstance(m, qins.QINSLinear) for m in back.modules())
    assert same_state(back, expected)
    back.save_pretrained(path / "back")
    assert "quantization_config" not in json.loads((path / "back" / "config.json").read_text())


def test_gradients_reach_the_input(tiny):
    _, path = tiny
    quantized = load(path / "float", quantization_config=qins.QinsConfig())
    embedded = quantized.get_input_embeddings()(torch.arange(3, 9)[None]).detach().requires_grad_()
    quantized(inputs_embeds=embedded).logits.square().mean().backward()
    assert embedded.grad.abs().sum() > 0


@pytest.mark.long
@pytest.mark.parametrize("order", ["import qins, transformers", "import transformers, qins"])
def test_importing_qins_is_enough(tiny, order):
    _, path = tiny
    load(path / "float", quantization_config=qins.QinsConfig()).save_pretrained(path / "out")
    code = f"""
{order}
model = transformers.AutoModelForCausalLM.from_pretrained({str(path / "out")!r})
assert type(model.model.layers[0].mlp.up_proj).__name__ == "QINSLinear"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_where_qins_is_not_installed(tmp_path):
    """transformers would go on with random weights; an empty tensor of a weight's name stops it."""
    cases = []
    for name in MODELS:
        model = make(name)
        model.save_pretrained(tmp_path / "float")
        model = type(model).from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig())
        model.save_pretrained(tmp_path / name, max_shard_size="40KB" if name == "qwen2" else "1GB")
        cases.append((type(model).__name__, tmp_path / name))
        _, told = type(model).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(told.values()), told
        empty = [n for n, t in qins.files.open_checkpoint(tmp_path / name).tensors.items() if not t.elements]
        assert len(empty) == 1
        assert empty[0].endswith(".weight")
    cases += [("AutoModelForCausalLM", tmp_path / "llama"), ("AutoModel", tmp_path / "llama"),
              ("LlamaForSequenceClassification", tmp_path / "llama")]  # fmt: skip
    # without the empty tensor, as in files of earlier versions, the checkpoint is not refused
    state = load_file(tmp_path / "llama" / "model.safetensors")
    (guard,) = (n for n, t in state.items() if t.numel() == 0)
    (tmp_path / "earlier").mkdir()
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    del config["quantization_config"]["checksums"][guard], state[guard]
    (tmp_path / "earlier" / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "earlier" / "model.safetensors", {"format": "pt"})
    assert without_qins(*cases, ("LlamaForCausalLM", tmp_path / "earlier")) == ["refused"] * len(cases) + ["loaded"]
    assert same_state(qins.load(tmp_path / "earlier", verify=True), qins.load(tmp_path / "llama"))


def test_the_empty_tensor_is_no_weight(tiny):
    """It is skipped when the file's tensors are loaded into a quantized model, and refused by a float model."""
    _, path = tiny
    quantized = load(path / "float", quantization_config=qins.QinsConfig("golden"), device_map="auto")
    quantized.save_pretrained(path / "out")
    state = load_file(path / "out" / "model.safetensors")
    assert state["model.layers.0.mlp.down_proj.weight"].numel() == 0
    other = load(path / "out")
    other.load_state_dict(state)
    assert same_state(other, quantized)
    with pytest.raises(RuntimeError, match="size mismatch for model.layers.0.mlp.down_proj.weight"):
        make("llama").load_state_dict(state, strict=False)


def test_load_refuses_other_checkpoints(tiny):
    _, path = tiny
    with pytest.raises(ValueError, match="quant_method 'qins', got None"):
        qins.load(path / "float")


def test_loading_codes_copies_nothing(tiny):
    _, path = tiny
    load(path / "float", quantization_config=qins.QinsConfig()).save_pretrained(path / "out")
    model = load(path / "out")
    with safe_open(path / "out" / "model.safetensors", framework="pt") as f:
        codes = f.get_tensor("model.layers.0.mlp.up_proj.codes")
    assert torch.equal(model.model.layers[0].mlp.up_proj.codes, codes)
    if sys.platform == "linux":
        where = model.model.layers[0].mlp.up_proj.codes.data_ptr()
        with open("/proc/self/maps") as maps:
            ranges = [line.split() for line in maps]
        mapped = [r for r in ranges if int(r[0].split("-")[0], 16) <= where < int(r[0].split("-")[1], 16)]
        assert mapped
        assert mapped[0][-1].endswith("model.safetensors")


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offload(tiny, where, buffers):
    """accelerate's hooks load weights, and codes if buffers are offloaded too, when a module runs."""
    accelerate = pytest.importorskip("accelerate")
    _, path = tiny
    config = qins.QinsConfig(lm_head=True, embeddings=True)
    quantized = load(path / "float", quantization_config=config)
    expected = outputs(quantized)
    more = {"execution_device": torch.device("cpu"), "offload_buffers": buffers}
    if where == "cpu":
        accelerate.cpu_offload(quantized, **more)
    else:
        accelerate.disk_offload(quantized, path / "offload", **more)
    assert torch.equal(outputs(quantized), expected)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_while_loading(tmp_path):
    """400 MB of float32 in one file: the peak is the codes and other tensors, the largest tensor, and 60 MiB."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    small = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    peak, held = peak_while_loading("LlamaForCausalLM", small, tmp_path)
    assert peak < held + 1024 * 4096 * 4 + (60 << 20)
