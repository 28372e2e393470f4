"""A converted transformers model under torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch

import qins

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.once


@pytest.fixture(params=["log8", "golden", "log5"])
def model(request):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    qins.convert(model, request.param, exclude=())
    return model


@pytest.mark.long
def test_compile_whole_model_without_graph_break(model):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def test_export(model):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        exported = torch.export.export(Logits(model).eval(), (ids,))
        called = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
        assert sum("qins.linear" in c for c in called) == 2 * 7 + 1
        torch.testing.assert_close(exported.module()(ids), model(ids).logits, rtol=1e-4, atol=1e-4)
