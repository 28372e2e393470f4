"""benchmarks/fidelity.py: its formats are those of qins itself, and its GPTQ that of the paper."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import qins
from qins.calibration import cut

pytest.importorskip("transformers")
pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import fidelity
import gptq
import ladder_picture
from tokens import sharp_llama, token_ids

pytestmark = pytest.mark.once


def subject():
    batches = cut(token_ids(2048), 2048, 64)
    return fidelity.Subject(sharp_llama(), fidelity.predictions([{"input_ids": batches[0]}]), batches)


def codes(model):
    return {n: t for n, t in model.state_dict().items() if "codes" in n or "scale" in n}


@pytest.mark.parametrize("name", ["calibrated", "calibrated log4", "calibrated log5/64", "plan 5", "plan 14"])
def test_calibrated_codes_are_those_of_calibrate(name):
    """Statistics are collected once for all formats; codes are as if each format had been calibrated by itself."""
    judged = subject()
    fidelity.made(judged, "calibrated log6")  # its statistics and factors serve the next format
    got, bits = fidelity.made(judged, name)
    expected = sharp_llama()
    if name.startswith("plan"):
        plan = qins.plan(expected, judged.calibration, target_bits=float(name.split()[1]))
        assert bits == pytest.approx(plan.bits)
        qins.calibrate(expected, judged.calibration, plan=plan)
    else:
        codec, _, size = (name.partition(" ")[2] or "log8").partition("/")
        report = qins.calibrate(expected, judged.calibration, codec=codec, group_size=int(size) if size else "default")
        weights = sum(math.prod(m.shape) for m in report.converted)
        assert bits == pytest.approx(8 * report.bytes_after / weights)
    assert codes(got)
    assert codes(got).keys() == codes(expected).keys()
    assert all(torch.equal(t, codes(expected)[n]) for n, t in codes(got).items())


def test_formats_by_name():
    judged = subject()
    with pytest.raises(ValueError, match="--formats: expected a codec, calibrated, plan, GPTQ or a peer, got 'GPTX'"):
        fidelity.made(judged, "GPTX")
    model, bits = fidelity.made(judged, "GPTQ/32")
    assert bits == 4 + 20 / 32
    for name, layer in judged.layers.items():
        assert not torch.equal(layer.weight, model.get_submodule(name).weight)
        for group in model.get_submodule(name).weight.split(32, 1):
            assert max(len(row.unique()) for row in group) <= 16


def obvious(weight, gram, variant):
    """Rounds a column at a time, and inverts the second moments of those that are left each time."""
    h = gram.double() + gptq.DAMPING * gram.double().diagonal().mean() * torch.eye(len(gram))
    grids = [gptq.grid(group, variant) for group in weight.T.split(variant.group_size)]
    left = sorted(range(len(h)), key=lambda j: -float(h[j, j]))
    w, values = weight.double(), torch.zeros_like(weight)
    while left:
        j = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        scale, zero = grids[j // variant.group_size]
        levels = scale[:, None] * (torch.arange(16) - zero[:, None])
        nearest = (levels - w[:, j, None]).abs().argmin(1, keepdim=True)
        values[:, j] = levels.gather(1, nearest)[:, 0]
        w[:, left] -= (w[:, j] - values[:, j])[:, None] / inverse[0, 0] * inverse[0]
        left = left[1:]
    return values


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_is_as_published(symmetric):
    """Compare with the paper's first form, on more columns than a block has; roundings of ties may differ."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(24, 200, generator=generator) * 0.02
    mixed = torch.randn(100, 200, generator=generator)
    x = (torch.randn(1000, 100, generator=generator) @ mixed + torch.randn(1000, 200, generator=generator)) * (
        0.1 + torch.rand(200, generator=generator)
    )
    gram = x.T @ x
    variant = gptq.Variant(64, symmetric=symmetric)
    got, expected = gptq.quantized(w, gram, variant), obvious(w, gram, variant)
    assert float((got == expected).double().mean()) > 0.98
    error, least, nearest = (
        float(((q - w) @ gram * (q - w)).sum()) for q in (got, expected, gptq.quantized(w, torch.eye(200), variant))
    )
    assert error == pytest.approx(least, rel=0.01)
    assert error < 0.7 * nearest


def test_gptq_ignores_inputs_that_are_always_zero():
    w = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(1))
    x[:, 7] = 0
    values = gptq.quantized(w, x.T @ x, gptq.Variant(32))
    assert (values[:, 7] == 0).all()
    assert values.isfinite().all()


def test_the_search_for_a_range_lowers_the_error():
    group = torch.randn(128, 50, generator=torch.Generator().manual_seed(0))
    for symmetric in (False, True):
        wide, found = (
            (gptq.rounded(group, *gptq.grid(group, gptq.Variant(symmetric=symmetric, search=search))) - group)
            for search in (False, True)
        )
        powers = [e.abs().pow(2.4).sum(0) for e in (wide, found)]
        assert (powers[1] <= powers[0]).all()
        assert powers[1].sum() < 0.95 * powers[0].sum()


def test_ratios_are_paired():
    generator = torch.Generator().manual_seed(0)
    of = torch.rand(1000, generator=generator, dtype=torch.float64)
    assert fidelity.ratio(0.5 * of, of) == pytest.approx((0.5, 0.0), abs=1e-12)
    noise = torch.randn(1000, generator=generator, dtype=torch.float64)
    share, error = fidelity.ratio(0.5 * of + 0.1 * noise, of)
    assert abs(share - 0.5) < 4 * error
    assert error == pytest.approx(0.1 / math.sqrt(1000) / 0.5, rel=0.1)


def test_the_picture_has_every_format_and_model():
    pytest.importorskip("matplotlib")
    rows = [
        {"model": model, "format": name, "bits": 4.0 + i / 4, "distance": 10.0**-i, "top_1": top}
        for model, top in (("SmolLM2", 0.9), ("MiniLM", None))
        for i, name in enumerate(["log4", "calibrated log4", "plan 4.5", "GPTQ", "Q4_K", "log5"])
    ]
    svg = ladder_picture.draw(rows)
    legend = ("qins, calibrated, by a plan", "GPTQ int4, calibrated, groups of 128 and 64")
    for words in ("SmolLM2-135M-Instruct", "1 - cosine", "Q4_K", "log5", *legend):
        assert f">{words}<" in svg


def test_labels_that_would_overlap_are_joined():
    points = {"Q4_K": (4.5, 0.03), "NF4": (4.5, 0.65), "Q5_K": (5.5, 0.029), "IQ4_NL": (4.5, 0.41), "Q4_0": (4.5, 0.62)}
    assert ladder_picture._labels(points) == [
        ((4.5, 0.65), ["NF4", "Q4_0", "IQ4_NL"]), ((4.5, 0.03), ["Q4_K"]), ((5.5, 0.029), ["Q5_K"]),
    ]  # fmt: skip
