"""convert: which modules are replaced, which are not, and the report."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import qins


class Special(nn.Linear):
    """Overrides forward, so it must not be converted."""

    def forward(self, x):
        return super().forward(x) * 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in "ab")
        self.shared = self.blocks[0]["up"]
        self.special = Special(64, 64)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        for b in self.blocks:
            h = h + b["down"](b["up"](h).relu())
        return self.lm_head(self.special(h) + self.shared(h)[..., :64])


@pytest.mark.parametrize(
    ("codec", "most"),
    [("golden", 0.02), ("log9", 0.02), ("log8", 0.02), ("log6", 0.04), ("log5", 0.08), ("log4", 0.16)],
)
def test_model(codec, most):
    torch.manual_seed(0)
    model = Model()
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        before = model(ids)
        report = qins.convert(model, codec)
        after = model(ids)
    assert [m.name for m in report.converted] == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert model.shared is model.blocks[0]["up"]
    assert type(model.special) is Special
    assert type(model.lm_head) is nn.Linear
    assert {s.name: s.reason.split()[0] for s in report.skipped} == {"special": "a", "lm_head": "excluded"}
    assert (after - before).norm() / before.norm() < most
    again = qins.convert(model, codec)
    assert not again.converted


@pytest.mark.parametrize(("group", "fallback"), [("default", 64), (128, 128), (None, 32)])
def test_layers_that_cannot_be_packed_get_log8(group, fallback):
    model = nn.Sequential(nn.Linear(64, 60), nn.Linear(60, 64), nn.Embedding(5, 12), nn.Embedding(5, 16))
    report = qins.convert(model, "log4", group_size=group, embeddings=True)
    packed = 32 if group in ("default", None) else group
    found = {m.name: (m.codec, m.group_size) for m in report.converted}
    assert found == {name: ("log4", packed) for name in "03"} | {name: ("log8", fallback) for name in "12"}
    assert {m.name: m.note for m in report.converted if m.note} == {
        "1": "log8 instead of log4: 60 inputs are not a multiple of 8",
        "2": "log8 instead of log4: 12 inputs are not a multiple of 8",
    }
    assert "\n1: log8 instead of log4: 60 inputs" in str(report)
    assert (model[1].codec, model[1].group_size) == ("log8", fallback)
    assert model[:2](torch.zeros(3, 64)).isfinite().all()


def test_report_is_a_table():
    report = qins.convert(nn.Sequential(nn.Linear(256, 100), nn.Linear(100, 256)), "log8")
    title, line, first, second, line_again, total = str(report).splitlines()
    assert line == line_again
    assert set(line) == {"-", " "}
    assert [row.split()[0] for row in (title, first, second, total)] == ["module", "0", "1", "total"]
    assert len({len(row) for row in (title, line, first, second, total)}) == 1


def test_report_counts_bytes_and_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 100), nn.Linear(100, 256))
    weights = [m.weight.detach().clone() for m in model]
    report = qins.convert(model, group_size=None)
    for m, w, q in zip(report.converted, weights, model, strict=True):
        assert m.shape == tuple(w.shape)
        assert m.bytes_before == w.numel() * 4
        assert m.bytes_after == w.numel() + 4 * w.shape[0] + 4
        noise = (w.double() - q.weight.double()).square().sum()
        assert m.snr_db == pytest.approx(float(10 * (w.double().square().sum() / noise).log10()), abs=1e-3)
    text = str(report)
    assert "100x256" in text
    assert f"{report.bytes_before:,}" in text
    assert f"{report.compression:.2f}x" in text
    assert report.to_dict()["converted"][0]["name"] == "0"


def test_include_exclude():
    names = lambda **kw: [m.name for m in qins.convert(Model(), **kw).converted]  # noqa: E731
    assert names(include="*.up") == ["blocks.0.up", "blocks.1.up"]
    assert names(include=["blocks.1.*"], exclude=["*.down"]) == ["blocks.1.up"]
    assert "lm_head" in names(exclude=())
    with pytest.raises(TypeError, match="include: expected patterns"):
        qins.convert(Model(), include=[3])


def test_modules_that_share_a_weight_share_codes():
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    model = nn.Sequential(a, b)
    report = qins.convert(model)
    assert len(report.converted) == 1
    assert model[0].codes.data_ptr() == model[1].codes.data_ptr()
    assert model[1].bias is b.bias
    assert "shares the codes" in str(report)


def test_a_bad_weight_names_its_module_and_leaves_the_model():
    model = Model()
    with torch.no_grad():
        model.blocks[1]["down"].weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.down: weights: .*1 NaN"):
        qins.convert(model)
    assert not any(isinstance(m, qins.QINSLinear) for m in model.modules())


def test_what_is_left_alone():
    model = nn.ModuleDict(
        {
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "conv": nn.Conv1d(4, 4, 1),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    report = qins.convert(model)
    assert not report.converted
    assert {s.name for s in report.skipped} == {"normed", "conv", "attention.out_proj"}
    assert "conv (Conv1d): a convolution" in str(report)
    assert "itself" in str(qins.convert(nn.Linear(3, 3)))


def test_hooks_modes_and_dtypes_stay():
    model = nn.Sequential(nn.Linear(16, 16)).to(torch.bfloat16).eval()
    seen = []
    model[0].register_forward_hook(lambda *a: seen.append(1))
    qins.convert(model)
    y = model(torch.randn(2, 16, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert seen == [1]
    assert not model[0].training
    assert model[0].weight.dtype == torch.bfloat16


def test_meta_model():
    model = nn.Sequential(nn.Linear(300, 20, device="meta"))
    report = qins.convert(model)
    assert model[0].codes.is_meta
    assert math.isnan(report.converted[0].snr_db)
    assert report.converted[0].bytes_after == 20 * 300 + 20 * 5 + 4 * 20 + 4


@pytest.mark.long
@pytest.mark.once
def test_resident_memory_shrinks():
    """A process with the converted model is smaller than one with the float model, by as much as the codes save.

    With many small layers, temporary memory of the conversion must not fragment the heap.
    """
    program = """
import sys, gc, torch, qins
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(256)))
x = torch.randn(3, 512)
if sys.argv[1] != "float":
    report = qins.convert(model, sys.argv[1], group_size=None)
    assert report.compression > 1.9
with torch.no_grad():
    for _ in range(3):
        model(x)
gc.collect()
resident = [l for l in open("/proc/self/status") if l.startswith("VmRSS")][0]
print(int(resident.split()[1]) * 1024)
"""
    size = {
        what: int(subprocess.run([sys.executable, "-c", program, what], check=True, capture_output=True).stdout)
        for what in ("float", "golden", "log9", "log8")
    }
    weights = 256 * 512 * 512
    assert size["float"] > 4 * weights
    slack = 40e6  # scratch, BLAS buffers, the package itself
    assert size["float"] - size["golden"] > 2 * weights - slack
    assert size["float"] - size["log9"] > 2.875 * weights - slack
    assert size["float"] - size["log8"] > 3 * weights - slack
