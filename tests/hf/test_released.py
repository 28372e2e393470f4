"""Checkpoints released in 8 and 4 bits: quantization while transformers loads them."""

from __future__ import annotations

import json

import pytest
import torch

import qins

transformers = pytest.importorskip("transformers")
import tiny  # noqa: E402
import tiny_experts  # noqa: E402
from released import FORMATS, NAMES, released  # noqa: E402

from qins.hf import load_floats  # noqa: E402

pytestmark = pytest.mark.once
V5 = tiny_experts.V5


def save(tmp_path, name, **told):
    model = tiny_experts.make("gpt_oss") if name == "mxfp4" else tiny.make("llama")
    return type(model), *released(tmp_path, model, name, lambda state, about: about.update(told))


def load(cls, path, config=None, **kwargs):
    return cls.from_pretrained(path, quantization_config=config or qins.QinsConfig(), **kwargs)


@pytest.mark.skipif(not V5, reason="transformers 4 reads whole state dicts")
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_of_the_floats(tmp_path, name):
    cls, source, floats = save(tmp_path, name)
    model, expected = load(cls, source, dtype=torch.float32), load(cls, floats, dtype=torch.float32)
    assert tiny.same_state(model, expected)
    report = model.hf_quantizer.report
    assert report.source_format == NAMES[name]
    assert f"from weights in {NAMES[name]}" in str(report)
    assert expected.hf_quantizer.report.source_format is None


@pytest.mark.skipif(not V5, reason="transformers 4 reads whole state dicts")
@pytest.mark.parametrize("name", ["fp8 block", "ct int4 groups", "mxfp4"])
def test_saved_and_loaded(tmp_path, name):
    cls, source, _ = save(tmp_path, name)
    model = load(cls, source)
    model.save_pretrained(tmp_path / "saved")
    again = qins.load(tmp_path / "saved")
    assert tiny.same_state(model, again)
    assert again.hf_quantizer.report.source_format == NAMES[name]
    about = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert about["source_format"] == NAMES[name]
    assert "released" not in about


@pytest.mark.skipif(not V5, reason="transformers 4 reads whole state dicts")
def test_left_layers_are_floats(tmp_path):
    cls, source, floats = save(tmp_path, "ct int4 groups")
    config = qins.QinsConfig(exclude=["*.q_proj"])
    model = load(cls, source, config, dtype=torch.float32)
    expected = cls.from_pretrained(floats, dtype=torch.float32).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected)
    assert isinstance(model.model.layers[0].self_attn.k_proj, qins.QINSLinear)
    again = load(cls, floats, config, dtype=torch.float32)  # reuses the config object
    assert again.hf_quantizer.report.source_format is None


@pytest.mark.skipif(V5, reason="transformers 5 reads tensor by tensor")
def test_transformers_4_is_refused(tmp_path):
    cls, source, _ = save(tmp_path, "fp8 block")
    with pytest.raises(ValueError, match="'fp8'.* in transformers 4.*convert the checkpoint with `qins quantize`"):
        load(cls, source)


def test_other_formats_are_refused(tmp_path):
    cls, source, _ = save(tmp_path, "fp8 block", quant_method="gptq", bits=4)
    with pytest.raises(ValueError, match="got 'gptq'; quantize the float model"):
        load(cls, source)


@pytest.mark.skipif(not V5, reason="transformers 4 reads whole state dicts")
def test_damage_names_the_tensor(tmp_path):
    model = tiny.make("llama")
    key = "model.layers.1.mlp.up_proj.weight_scale_inv"
    source, floats = released(tmp_path, model, "fp8 block", lambda state, about: state.pop(key))
    config = qins.QinsConfig()
    with pytest.raises(ValueError, match=f"expected its scales in {key}, got none"):
        load(type(model), source, config)
    assert load(type(model), floats, config).hf_quantizer.report.source_format is None  # nothing is left behind


@pytest.mark.parametrize("name", ["fp8 block", "ct int8 asymmetric", "mxfp4"])
def test_loaded_as_floats(tmp_path, name):
    cls, source, floats = save(tmp_path, name)
    model = load_floats(cls, source, dtype=torch.float32)
    assert tiny.same_state(model, cls.from_pretrained(floats, dtype=torch.float32))
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.skipif(not V5, reason="transformers 4 decodes neither without a GPU")
@pytest.mark.parametrize("name", ["fp8 even blocks", "mxfp4"])
def test_floats_are_those_of_transformers(tmp_path, name):
    if name.startswith("fp8") and transformers.__version__.startswith("5.0."):
        pytest.skip("NOT RUN: transformers 5.0 decodes FP8 with triton alone")
    cls, source, _ = save(tmp_path, name)
    dtype = torch.bfloat16 if name == "mxfp4" else torch.float32
    assert tiny.same_state(cls.from_pretrained(source, dtype=dtype), load_floats(cls, source, dtype=dtype))


def test_floats_of_a_part_of_a_model(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = transformers.CLIPConfig(text_config={**sizes, "vocab_size": 160}, vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    cls = transformers.CLIPTextModel
    assert tiny.same_state(cls.from_pretrained(tmp_path), load_floats(cls, tmp_path))


def test_the_config_of_floats_is_read_once(tmp_path, monkeypatch):
    """Where transformers fails to find it the second time, it makes its default model, of billions of weights."""
    cls, _, floats = save(tmp_path, "fp8 block")
    expected = cls.from_pretrained(floats, dtype=torch.float32)
    with monkeypatch.context() as m:
        m.setattr(cls.config_class, "from_pretrained", lambda *args, **kwargs: pytest.fail("read again"))
        assert tiny.same_state(expected, load_floats(cls, floats, dtype=torch.float32))
