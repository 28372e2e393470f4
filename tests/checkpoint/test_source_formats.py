"""Checkpoints released in 8 and 4 bits: conversion on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import qins
from qins.checkpoint import quantize_checkpoint
from qins.files import inspect, open_checkpoint, open_scaled
from qins.files.scaled import ScaledCheckpoint, ScaledWeight

transformers = pytest.importorskip("transformers")
import tiny  # noqa: E402
import tiny_experts  # noqa: E402
from released import FORMATS, NAMES, packed, released  # noqa: E402
from tokens import save_tokenizer, text  # noqa: E402

from qins.hf import Calibration  # noqa: E402

pytestmark = pytest.mark.once


def save(tmp_path, name, change=lambda state, about: None):
    model = tiny_experts.make("gpt_oss") if name == "mxfp4" else tiny.make("llama")
    return released(tmp_path, model, name, change)


def about(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_of_the_floats(tmp_path, name):
    source, floats = save(tmp_path, name)
    one, other = tmp_path / "one", tmp_path / "other"
    assert quantize_checkpoint(source, one)["source"] == NAMES[name]
    assert quantize_checkpoint(floats, other)["source"] is None
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    configs = [about(d) for d in (one, other)]
    assert configs[0]["quantization_config"].pop("source_format") == NAMES[name]
    assert f"| made from | {NAMES[name]} |" in (one / "README.md").read_text()
    assert "made from" not in (other / "README.md").read_text()
    for config in configs:
        config["quantization_config"].pop("source")  # the fingerprint of the files
    assert configs[0] == configs[1]


@pytest.mark.skipif(not tiny_experts.V5, reason="transformers 4 reads whole state dicts")
@pytest.mark.parametrize("name", FORMATS)
def test_same_codes_while_loading(tmp_path, name):
    source, _ = save(tmp_path, name)
    quantize_checkpoint(source, tmp_path / "out")
    converted = qins.load(tmp_path / "out", dtype=torch.float32)
    loaded = type(converted).from_pretrained(source, quantization_config=qins.QinsConfig(), dtype=torch.float32)
    assert tiny.same_state(converted, loaded)


@pytest.mark.skipif(not tiny_experts.V5, reason="transformers 4 has each expert as modules")
@pytest.mark.parametrize("name", ["fp8 block", "ct int8 row", "ct int4 groups"])
def test_experts_with_tensors_of_their_own(tmp_path, name):
    """The model has stacks of experts; each of the checkpoint's matrices has its own scales."""
    source, floats = released(tmp_path, tiny_experts.make("qwen2_moe"), name)
    keys = open_checkpoint(source).tensors
    assert any(".experts.3.down_proj.weight_" in k for k in keys)
    quantize_checkpoint(source, tmp_path / "one")
    quantize_checkpoint(floats, tmp_path / "other")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()
    converted = qins.load(tmp_path / "one", dtype=torch.float32)
    assert [type(m.mlp.experts) for m in converted.model.layers] == [qins.QINSExperts] * len(converted.model.layers)
    loaded = type(converted).from_pretrained(source, quantization_config=qins.QinsConfig(), dtype=torch.float32)
    assert tiny.same_state(converted, loaded)


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_at_a_time(tmp_path, name, monkeypatch):
    source, floats = save(tmp_path, name)
    monkeypatch.setattr("qins.files.scaled._PART", 200)  # a few rows
    decoded, expected = open_scaled(open_checkpoint(source)), open_checkpoint(floats)
    assert decoded.tensors.keys() == expected.tensors.keys()
    for key, t in decoded.tensors.items():
        got = decoded.load(key)
        assert torch.equal(got.float(), expected.load(key)), key
        assert t.shape == got.shape == expected.tensors[key].shape
        assert t.dtype == str(got.dtype)[6:]


def test_mxfp4_as_transformers_decodes_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source, _ = save(tmp_path, "mxfp4")
    stored = open_checkpoint(source)
    decoded = open_scaled(stored)
    for name in [n for n in decoded.tensors if n.endswith("experts.down_proj") or n.endswith("gate_up_proj")]:
        parts = [stored.load(f"{name}_{part}") for part in ("blocks", "scales")]
        assert torch.equal(convert_moe_packed_tensors(*parts), decoded.load(name))


LAYER = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def without(key):
    return lambda state, about: state.pop(key)


def put(key, value):
    return lambda state, about: state.update({key: value(state.get(key))})


def told(**values):
    return lambda state, about: about.update(values)


def told_weights(**values):
    return lambda state, about: about["config_groups"]["group_0"]["weights"].update(values)


def targets(*names):
    return lambda state, about: about["config_groups"]["group_0"].update(targets=list(names))


def test_weights_have_8_bits_unless_told(tmp_path):
    def change(_, about):
        del about["config_groups"]["group_0"]["weights"]["num_bits"]

    source, floats = save(tmp_path, "ct int8 row", change)
    decoded = open_scaled(open_checkpoint(source)).load(LAYER)
    assert torch.equal(decoded.float(), open_checkpoint(floats).load(LAYER))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp8 block", without(f"{LAYER}_scale_inv"), f"{LAYER}: expected its scales in {LAYER}_scale_inv, got none"),
        ("fp8 block", put(f"{LAYER}_scale_inv", lambda t: torch.ones(1, 7)), f"{LAYER}_scale_inv: expected shape"),
        ("fp8 block", put(f"{LAYER}_scale_inv", lambda t: t * torch.nan), f"{LAYER}_scale_inv: expected finite"),
        ("fp8 block", put(f"{LAYER}_scale_inv", lambda t: t.int()), f"{LAYER}_scale_inv: expected float32 or"),
        ("fp8 block", told(weight_block_size=[0, 4]), "weight_block_size: expected two positive numbers, got"),
        ("fp8 block", told(weight_block_size="big"), "weight_block_size: expected two positive numbers, got 'big'"),
        ("fp8 block", put(LAYER, lambda t: t[0]), f"{LAYER}: expected a matrix, got shape"),
        ("fp8 tensor", put(LAYER, lambda t: t.float().to(torch.float8_e5m2)), f"{LAYER}: expected float8_e4m3fn"),
        ("ct fp8 row", without(f"{LAYER}_scale"), f"{LAYER}: expected its scales in"),
        ("ct fp8 row", put(f"{LAYER}_scale", lambda t: t[:-1]), f"{LAYER}_scale: expected shape"),
        ("ct fp8 row", told(config_groups=3), "config_groups: expected an object of objects, got 3"),
        ("ct fp8 row", told_weights(num_bits=4), "group_0: expected 8 bits of type float or"),
        ("ct fp8 row", told_weights(strategy="tensor_group"), "strategy: expected tensor, channel, group or block"),
        ("ct fp8 row", told_weights(type="int"), f"{LAYER.replace('self_attn.q', 'mlp.down')}: expected int8, got"),
        ("ct fp8 block", told_weights(block_structure=[1]), "block_structure: expected two positive numbers"),
        ("ct fp8 row", told(transform_config={"config_groups": {"R": {}}}), "expected no transforms"),
        ("ct fp8 row", told(sparsity_config={"format": "sparse-24-bitmask"}), "got format 'sparse-24-bitmask'"),
        ("ct int8 asymmetric", without(f"{LAYER}_zero_point"), f"{LAYER}: expected its zero points in"),
        ("ct int8 row", put(f"{LAYER}_scale", lambda t: t * torch.inf), f"{LAYER}_scale: expected finite scales"),
        ("ct int4 groups", without(f"{LAYER}_scale"), f"{LAYER}_packed: expected its scales in {LAYER}_scale"),
        ("ct int4 groups", without(f"{LAYER}_shape"), f"{LAYER}_packed: expected its shape in {LAYER}_shape"),
        ("ct int4 groups", put(f"{LAYER}_shape", lambda t: t * 2), f"{LAYER}_packed: expected int32 of 4 bits"),
        ("ct int4 groups", put(f"{LAYER}_packed", lambda t: t[:, :-1].contiguous()), f"{LAYER}_packed: expected int32"),
        ("ct int4 groups", told_weights(group_size=0), "group_size: expected a positive number, got 0"),
        ("ct int4 groups", told_weights(group_size=64), "_scale: expected shape"),
        ("ct int4 groups", put(f"{LAYER}_g_idx", lambda _: torch.arange(64)), f"{LAYER}_g_idx: expected groups in the"),
        ("ct fp8 row", told(format="mxfp8-quantized"), "got 8 of type float in format 'mxfp8-quantized'"),
        ("ct fp8 row", told(format="nvfp4-pack-quantized"), "got 8 of type float in format 'nvfp4-pack-quantized'"),
        ("ct fp8 row", told(quant_method="modelopt"), "got 'modelopt'; quantize the float model that"),
        ("ct int4 asymmetric", put(f"{LAYER}_zero_point", lambda t: t[:-1]), f"{LAYER}_zero_point: expected shape"),
        ("ct int4 groups", targets("re:("), "targets: expected a reg"),
        ("ct int4 groups", targets("re:(.|.)+[!?]"), "targets: expected a pattern that needs less than 1 s"),
        ("ct int4 groups", targets("lm_head"), "expected a group of"),
        ("mxfp4", without(f"{EXPERTS}_scales"), f"{EXPERTS}_blocks: expected its scales in {EXPERTS}_scales, got none"),
        ("mxfp4", without(f"{EXPERTS}_blocks"), f"{EXPERTS}_scales: expected its weights in {EXPERTS}_blocks"),
        ("mxfp4", put(f"{EXPERTS}_scales", lambda t: t[..., :1].contiguous()), f"{EXPERTS}_scales: expected shape"),
        ("mxfp4", put(f"{EXPERTS}_scales", lambda t: t.fill_(255)), f"{EXPERTS}_scales: expected finite scales"),
        ("mxfp4", put(f"{EXPERTS}_blocks", lambda t: t[..., :8].contiguous()), f"{EXPERTS}_blocks: expected uint8"),
        ("fp8 tensor", told(quant_method="gptq"), "got 'gptq'; quantize the float model that"),
        ("fp8 tensor", told(quant_method=None, load_in_4bit=True), "got 'bitsandbytes'; quantize the float model"),
    ],
)  # fmt: skip
def test_refused(tmp_path, name, change, message):
    source, _ = save(tmp_path, name, change)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        quantize_checkpoint(source, tmp_path / "out")
    assert str(source) in str(e.value)


def test_groups_of_modules(tmp_path):
    """A group that targets a module takes precedence over one that targets its class."""

    def change(state, about):
        groups = about["config_groups"]
        groups["group_1"] = json.loads(json.dumps(groups["group_0"])) | {"targets": ["re:.*self_attn.*"]}
        groups["group_0"]["weights"] |= {"num_bits": 8, "group_size": 64}
        for key in [k for k in state if ".mlp." in k and k.endswith("weight_packed")]:
            state.pop(key)
            key = key.removesuffix("_packed")
            rows, columns = (int(n) for n in state.pop(f"{key}_shape"))
            state[key] = torch.ones(rows, columns, dtype=torch.int8)
            state[f"{key}_scale"] = torch.full((rows, -(-columns // 64)), 0.5)

    source, floats = save(tmp_path, "ct int4 groups", change)
    decoded, expected = open_scaled(open_checkpoint(source)), open_checkpoint(floats)
    assert decoded.source_format == "compressed-tensors int8 (groups of 64) and int4 (groups of 16)"
    assert torch.equal(decoded.load(LAYER), expected.load(LAYER))
    assert decoded.load("model.layers.1.mlp.down_proj.weight").unique().tolist() == [0.5]


@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_against_the_floats(tmp_path, name):
    source, floats = save(tmp_path, name)
    quantize_checkpoint(source, tmp_path / "out")
    report = inspect(tmp_path / "out", source)
    assert report.errors == inspect(tmp_path / "out", floats).errors
    coded = [e for e in report.errors if e.name in {layer.name for layer in report.layers}]
    assert len(coded) == len(report.layers)
    assert all(40 < e.snr_db < 60 for e in coded)


@pytest.mark.parametrize("name", ["fp8 block", "ct int4 asymmetric", "mxfp4"])
@pytest.mark.parametrize("target", [None, 8.8])
def test_calibrated(tmp_path, name, target):
    source, floats = save(tmp_path, name)
    for directory in (source, floats):
        save_tokenizer(directory)
    calibration = Calibration(text(1200), 1024, target)
    one, other = tmp_path / "one", tmp_path / "other"
    assert quantize_checkpoint(source, one, calibration=calibration)["source"] == NAMES[name]
    quantize_checkpoint(floats, other, calibration=calibration)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    quantize_checkpoint(floats, tmp_path / "nearest")
    assert (one / "model.safetensors").read_bytes() != (tmp_path / "nearest" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_few_rows(bits):
    """All zero points of a column of blocks fit in one 32-bit word."""
    w = torch.zeros(4, 64)
    stored, want = packed("a.weight", w, np.random.default_rng(0), bits, (1, 32), symmetric=False)
    about = ScaledWeight("a.weight_packed", "a.weight_scale", "a.weight_zero_point", (4, 64), (1, 32), bits,
                         packed_zeros=True)  # fmt: skip
    source = Stored({name: torch.tensor(t.tolist(), dtype=t.dtype) for name, t in stored.items()})
    got = ScaledCheckpoint(Path("x"), "safetensors", source=source, weights={"a.weight": about}).load("a.weight")
    assert torch.allclose(got, want, rtol=1e-6, atol=0)


class Stored:
    """A checkpoint in memory."""

    def __init__(self, tensors):
        self.load = tensors.__getitem__
