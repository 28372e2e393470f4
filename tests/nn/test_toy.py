"""The seed's greedy suite: 500 of 500 tokens, and memory counted by dtype and storage."""

from __future__ import annotations

import copy

import pytest
import torch
import toy

import qins

MIB = 2**20
STEPS = 500
PROMPT = [17, 4242, 99, 1234, 7]


@pytest.fixture(scope="module")
def model():
    return toy.ToyModel().eval()


@pytest.fixture(scope="module")
def reference_tokens(model):
    return toy.greedy(model, PROMPT, STEPS)


@pytest.mark.long
@pytest.mark.once
@pytest.mark.parametrize(("codec", "group"), [("golden", None), ("log9", None), ("log8", None), ("log8", 128)])
def test_greedy_tokens(model, reference_tokens, codec, group):
    converted = copy.deepcopy(model)
    report = qins.convert(converted, codec, group_size=group)
    assert len(report.converted) == 6 * toy.LAYERS
    assert toy.greedy(converted, PROMPT, STEPS) == reference_tokens
    # a random model repeats itself, so equal tokens prove little; the logits must be close too
    ids = torch.randint(toy.VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = model(ids), converted(ids)
    assert (logits - expected).norm() / expected.norm() < 0.01


def counted(model):
    """Return bytes by (parameter or buffer, dtype), each storage counted once."""
    seen, sizes = set(), {}
    for kind, tensors in (("parameter", model.parameters()), ("buffer", model.buffers())):
        for t in tensors:
            if t.untyped_storage().data_ptr() not in seen:
                seen.add(t.untyped_storage().data_ptr())
                assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
                sizes[kind, t.dtype] = sizes.get((kind, t.dtype), 0) + t.untyped_storage().nbytes()
    return sizes


def test_memory(model):
    assert counted(model).keys() == {("parameter", torch.float32)}
    before = sum(counted(model).values())
    assert round(before / MIB, 2) == 13.91
    golden = copy.deepcopy(model)
    qins.convert(golden, "golden")
    sizes = counted(golden)
    coded = 12 * toy.HIDDEN**2 * toy.LAYERS
    embedding = toy.VOCABULARY * toy.HIDDEN * 4
    assert sizes["buffer", torch.uint8] == sizes["buffer", torch.int8] == coded
    # the seed counts the embedding and the encoded layers, without norms and biases (0.03)
    assert round((embedding + 2 * coded) / MIB, 2) == 9.38
    assert round(before / sum(sizes.values()), 2) == 1.48
    expected = {"log9": 1.87, "log8": 1.94}
    for codec, ratio in expected.items():
        m = copy.deepcopy(model)
        qins.convert(m, codec, group_size=None)
        assert round(before / sum(counted(m).values()), 2) == pytest.approx(ratio, abs=0.01)
        assert all(d != torch.float32 or n < 40000 for (k, d), n in counted(m).items() if k == "buffer")


def test_layer_by_layer(model):
    m = copy.deepcopy(model)
    report = qins.convert(m, "golden")
    for row in report.converted:
        module = m.get_submodule(row.name)
        assert row.bytes_before == module.in_features * module.out_features * 4
        assert row.bytes_after == module.in_features * module.out_features * 2 + 8
