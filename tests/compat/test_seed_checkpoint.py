"""Checkpoints saved by the seed's code."""

from __future__ import annotations

import copy

import pytest
import torch
from damage import DAMAGES, damaged
from safetensors.torch import save_file
from small import converted, model
from torch import nn

import qins

pytestmark = pytest.mark.once


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_load_seed_checkpoint(tmp_path, kind):
    saved = converted("golden")
    path = tmp_path / "seed.pt"
    torch.save(saved.state_dict(), path) if kind == "torch" else save_file(saved.state_dict(), path)
    target = model(seed=1).eval()
    assert qins.load_seed_checkpoint(target, path) == ["0", "2"]
    assert isinstance(target[0], qins.QINSLinear)
    assert target[0].codec == "golden"
    assert not target[0].training
    for key, value in saved.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)
    path.unlink()  # the model has its own copy of the codes
    x = torch.randn(3, 60)
    assert torch.equal(target[2](target[0](x)), saved[2](saved[0](x)))


def test_load_seed_checkpoint_with_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.proj, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    m, target = Tied(), Tied()
    qins.convert(m, "golden", include="proj")
    state = m.state_dict()
    del state["head.weight"]
    torch.save(state, tmp_path / "tied.pt")
    qins.load_seed_checkpoint(target, tmp_path / "tied.pt")
    assert torch.equal(target.head.weight, m.embed.weight)
    assert target.head.weight is target.embed.weight


def test_load_seed_checkpoint_that_does_not_fit(tmp_path):
    state = converted("golden").state_dict()
    cases = {
        "expected an nn.Linear of the model, got ReLU": {
            ("1" + k[1:] if k[0] == "0" else k): v for k, v in state.items()
        },
        "expected an nn.Linear of the model, got no such module": {
            ("9" + k[1:] if k[0] == "0" else k): v for k, v in state.items()
        },
        "missing 0.bias": {k: v for k, v in state.items() if k != "0.bias"},
        "unexpected x": state | {"x": torch.zeros(1)},
        "mismatched 3.weight": state | {"3.weight": torch.zeros(2, 2)},
        "got none": model().state_dict(),
    }
    for message, bad in cases.items():
        torch.save(bad, tmp_path / "bad.pt")
        target = model(seed=1)
        before = copy.deepcopy(target)
        with pytest.raises(ValueError, match=message):
            qins.load_seed_checkpoint(target, tmp_path / "bad.pt")
        assert [type(m) for m in target] == [type(m) for m in before]
        assert all(torch.equal(a, b) for a, b in zip(target.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("change", DAMAGES)
def test_damaged_files_change_nothing(tmp_path, change):
    save_file(damaged(converted("golden").state_dict(), change), tmp_path / "bad.safetensors")
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises((ValueError, TypeError)):
        qins.load_seed_checkpoint(target, tmp_path / "bad.safetensors")
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


def test_the_empty_tensor_is_no_weight(tmp_path):
    """The empty tensor in qins checkpoints, which stops transformers without qins, is skipped."""
    transformers = pytest.importorskip("transformers")
    from tiny import make, same_state

    make("llama").save_pretrained(tmp_path / "float")
    config = qins.QinsConfig("golden")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    quantized.save_pretrained(tmp_path / "out")
    again = make("llama", seed=1)
    assert len(qins.load_seed_checkpoint(again, tmp_path / "out")) == 14
    assert same_state(again, quantized)
