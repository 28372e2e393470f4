"""Checkpoints of codes where nobody imports qins: torch calls the entry point."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import qins

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directories of a float model and of its codes, and the quantized model's logits."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    floats, codes = tmp_path_factory.mktemp("floats"), tmp_path_factory.mktemp("codes")
    model.save_pretrained(floats)
    qins.convert(model)
    model.save_pretrained(codes)
    with torch.no_grad():
        return floats, codes, model(torch.arange(10)[None]).logits


def python(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_transformers_alone_loads_codes(checkpoint, tmp_path):
    _, codes, expected = checkpoint
    program = """
import sys, torch
assert not [m for m in sys.modules if m.split(".")[0] == "qins"]
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(10)[None]).logits, sys.argv[2])
"""
    run = python(program, codes, tmp_path / "logits.pt")
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_quantizers_first(checkpoint):
    """transformers.quantizers.auto imports torch, so it is only partly imported when torch calls the entry point."""
    program = """
import sys
import transformers.quantizers.auto
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "QINSLinear"
"""
    run = python(program, checkpoint[1])
    assert run.returncode == 0, run.stderr


@pytest.mark.long
def test_where_qins_cannot_be_imported(checkpoint):
    """Float checkpoints load; codes raise an error, since without a quantizer the weights would be random."""
    program = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[2])
except ImportError as e:
    assert "codes of qins, which cannot be used here: environment variable QINS_ISA" in str(e), e
else:
    raise AssertionError("loaded")
"""
    run = python(program, *checkpoint[:2], QINS_ISA="nonsense")
    assert run.returncode == 0, run.stderr
