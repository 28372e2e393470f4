"""Checkpoints released in 8 bits, converted on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qins.checkpoint import quantize_checkpoint

transformers = pytest.importorskip("transformers")
from tiny import make  # noqa: E402

pytestmark = pytest.mark.once


def write(tmp_path, block, change=lambda state: None, **told):
    """A model in FP8, and the same in floats, by float64 arithmetic element by element."""
    make("llama").save_pretrained(tmp_path / "float")
    state = load_file(tmp_path / "float" / "model.safetensors")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    fp8, rng = dict(state), np.random.default_rng(0)
    for name in [k for k in state if k.endswith("_proj.weight")]:
        codes = (state[name].float() * 1000).clamp(-448, 448).to(torch.float8_e4m3fn)
        rows, columns = codes.shape
        h, w = block or (rows, columns)
        scale = rng.uniform(1e-4, 1e-2, (-(-rows // h), -(-columns // w))).astype(np.float32)
        exact = codes.float().numpy().astype(np.float64)
        for i in range(rows):
            for j in range(columns):
                exact[i, j] *= float(scale[i // h, j // w])
        fp8[name] = codes
        fp8[name + "_scale_inv"] = torch.from_numpy(scale if block else scale.reshape(()))
        state[name] = torch.from_numpy(exact.astype(np.float32))
    change(fp8)
    (tmp_path / "fp8").mkdir()
    save_file(fp8, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    save_file(state, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    about = {"quant_method": "fp8", "weight_block_size": block and list(block)} | told
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": about}))


@pytest.mark.parametrize("block", [(16, 32), (24, 40), (128, 128), None])
def test_fp8(tmp_path, block):
    write(tmp_path, block)
    result = quantize_checkpoint(tmp_path / "fp8", tmp_path / "one")
    assert result["source"] == ("block-scaled FP8" if block else "FP8")
    assert quantize_checkpoint(tmp_path / "float", tmp_path / "other")["source"] is None
    one, other = (tmp_path / d for d in ("one", "other"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    configs = [json.loads((d / "config.json").read_text()) for d in (one, other)]
    for config in configs:
        config["quantization_config"].pop("source")  # the fingerprint of the files
    assert configs[0] == configs[1]


NAME = "model.layers.0.self_attn.q_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("change", "told", "message"),
    [
        (lambda s: s.pop(NAME), {}, "expected its scales in"),
        (lambda s: s.update({NAME: torch.ones(1, 7)}), {}, "scale_inv: expected shape"),
        (lambda s: s[NAME].fill_(float("nan")), {}, "expected finite scales"),
        (lambda s: None, {"quant_method": "gptq"}, "got 'gptq'"),
    ],
)
def test_refused(tmp_path, change, told, message):
    write(tmp_path, (16, 32), change, **told)
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "out")
