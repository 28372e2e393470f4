"""memory_report counts every byte once, and makes neither of the seed's two errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from toy import ToyModel

import qins

pytestmark = pytest.mark.once


def test_float_model():
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 10, bias=False).bfloat16())
    report = qins.memory_report(model)
    assert report.parameter_bytes == 4 * (30 * 20 + 20 + 20 + 20) + 2 * 20 * 10
    assert report.buffer_bytes == 4 * (20 + 20) + 8  # num_batches_tracked is int64
    assert report.total_bytes == report.parameter_bytes + report.buffer_bytes
    assert report.by("dtype") == {"float32": 4 * (30 * 20 + 60 + 40), "int64": 8, "bfloat16": 400}
    assert report.by_layer()["0"] == 4 * (30 * 20 + 20)
    assert not report.problems


def test_the_seeds_first_error():
    """The seed's 34x counted parameters only; codes are buffers, and the correct factor is 1.48x."""
    model = ToyModel()
    before = qins.memory_report(model)
    assert before.compression == 1.0
    qins.convert(model, "golden", exclude=())
    report = qins.memory_report(model)
    assert report.float32_bytes == before.total_bytes
    assert 13.9 < before.total_bytes / 2**20 < 14.0
    assert 1.47 < before.total_bytes / report.total_bytes < 1.49
    assert report.compression == pytest.approx(before.total_bytes / report.total_bytes)
    codes = report.by("role")
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, qins.QINSLinear))
    assert codes["codes"] == codes["sign"] == weights
    assert report.buffer_bytes > 2 * weights
    assert not report.problems
    without_buffers = before.total_bytes / report.parameter_bytes
    assert without_buffers > 2 > report.compression  # the factor by the seed's count


def test_the_seeds_second_error():
    """A layer claims to be quantized but keeps float32, four bytes per weight."""

    class QINSWeightLinear(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.register_buffer("w_encoded", torch.zeros(64, 32).to(dtype))

    report = qins.memory_report(nn.Sequential(QINSWeightLinear(torch.float32)))
    assert len(report.problems) == 1
    assert "0.w_encoded" in report.problems[0]
    assert "float32" in report.problems[0]
    assert "not quantized" in report.problems[0]
    assert report.compression == 1.0
    good = qins.memory_report(nn.Sequential(QINSWeightLinear(torch.uint8)))
    assert not good.problems
    assert good.compression == 4.0


def test_hidden_copies_are_found():
    layer = qins.QINSLinear.from_linear(nn.Linear(64, 64))
    layer.cached = {"weight": [layer.weight]}
    report = qins.memory_report(layer)
    assert report.attribute_bytes == 64 * 64 * 4
    assert "dequantized copy" in report.problems[0]
    assert report.total_bytes > 5 * 64 * 64
    assert report.float32_bytes == qins.memory_report(nn.Linear(64, 64)).total_bytes


@pytest.mark.parametrize(
    ("codec", "least", "most"),
    [("log8", 3.9, 4), ("log9", 3.5, 4), ("golden", 1.99, 4), ("log6", 5.0, 6), ("log5", 6.0, 7), ("log4", 7.4, 8)],
)
def test_compression_of_codecs(codec, least, most):
    layer = qins.QINSLinear.from_linear(nn.Linear(1024, 512, bias=False), codec)
    report = qins.memory_report(layer)
    assert least < report.compression <= most
    assert report.float32_bytes == 4 * 1024 * 512
    assert report.total_bytes == sum(b.nbytes for b in layer.buffers())


def test_shared_storage_counts_once():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 8), "head": nn.Linear(8, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    model["twin"] = model["head"]
    report = qins.memory_report(model)
    assert report.total_bytes == 50 * 8 * 4
    assert [t.shares for t in report.tensors] == [None, "embed.weight"]
    assert report.compression == 1.0


def test_views_count_what_they_keep_alive():
    model = nn.Module()
    big = torch.zeros(1 << 20)
    model.register_buffer("part", big[:10])
    model.register_buffer("other", big[10:20])
    report = qins.memory_report(model)
    assert report.total_bytes == 4 << 20
    assert "keeps a storage" in report.problems[0]


def test_attributes_of_a_page_are_no_problem():
    layer = qins.QINSLinear.from_linear(nn.Linear(64, 64))
    layer.kept = torch.zeros(1024)
    assert not qins.memory_report(layer).problems
    layer.kept = torch.zeros(1025)
    assert "a tensor of 4,100 bytes in a plain attribute" in qins.memory_report(layer).problems[0]


def test_meta_tensors_take_nothing():
    report = qins.memory_report(nn.Linear(10, 10, device="meta"))
    assert (report.total_bytes, report.meta_bytes) == (0, 4 * 110)
    assert report.compression == 1.0
    assert "meta device" in str(report)


def test_forms(capsys):
    model = nn.Sequential(qins.QINSLinear.from_linear(nn.Linear(64, 32)), nn.ReLU())
    report = qins.memory_report(model)
    loaded = json.loads(report.to_json())
    assert loaded == json.loads(json.dumps(report.to_dict()))
    assert loaded["total_bytes"] == sum(t["resident_bytes"] for t in loaded["tensors"])
    text = str(report)
    assert "0.codes" in text
    assert "buffer, codes" in text
    assert f"{report.total_bytes:,}" in text
    assert str(qins.memory_report(copy.deepcopy(model))) == text
    with pytest.raises(TypeError, match="model: expected an nn.Module"):
        qins.memory_report({"weight": 1})
    assert qins.memory_report(nn.Module()).total_bytes == 0
