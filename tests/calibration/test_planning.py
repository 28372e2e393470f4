"""Plans: estimates against measurements, the allocation against exhaustive search, and planned checkpoints."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import qins
from qins.calibration.activations import Layer, cut
from qins.calibration.planning import Option, allocate, candidate_formats, hull, sensitivities

transformers = pytest.importorskip("transformers")
from tiny import make  # noqa: E402
from tokens import sharp_llama, token_ids  # noqa: E402

pytestmark = pytest.mark.once


def model_and_batches():
    return sharp_llama(), cut(token_ids(2048), 2048, 64)


class Pooled(torch.nn.Module):
    """A model whose output has neither logits nor states."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids):
        return self.encoder(input_ids).last_hidden_state.mean(1)


def linear_layers(model):
    return {
        n: Layer(m, "log8", None) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }


def test_sensitivities_predict_divergence():
    """Compare the estimate with the divergence caused by noise on one layer's output, small enough for second order."""
    model, batches = model_and_batches()
    layers = linear_layers(model)
    found, measure = sensitivities(model, layers, batches)
    assert measure == "KL divergence"
    ids = batches[0]
    with torch.no_grad():
        p = model(ids).logits.log_softmax(-1)
    generator = torch.Generator().manual_seed(1)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"):
        measured = []
        for _ in range(8):
            hook = layers[name].module.register_forward_hook(
                lambda _m, _x, y: y + 0.01 * torch.randn(y.shape, generator=generator)
            )
            with torch.no_grad():
                q = model(ids).logits.log_softmax(-1)
            hook.remove()
            measured.append(float((p.exp() * (p - q)).sum(-1).mean()))
        estimate = 0.5 * 0.01**2 * float(found[name].sum())
        assert estimate == pytest.approx(np.mean(measured), rel=0.35), name
    assert all(p.requires_grad for p in model.parameters())


def test_sensitivities_predict_angles():
    """Likewise for an encoder, and 1 - cosine of its states."""
    torch.manual_seed(0)
    model, batches = make("bert").bert, model_and_batches()[1]
    layers = linear_layers(model)
    found, measure = sensitivities(model, layers, batches)
    assert measure == "1 - cosine of states"
    ids = batches[0]
    with torch.no_grad():
        before = model(ids).last_hidden_state
    generator = torch.Generator().manual_seed(1)
    for name in ("encoder.layer.0.attention.self.value", "encoder.layer.1.output.dense"):
        measured = []
        for _ in range(8):
            hook = layers[name].module.register_forward_hook(
                lambda _m, _x, y: y + 0.01 * torch.randn(y.shape, generator=generator)
            )
            with torch.no_grad():
                after = model(ids).last_hidden_state
            hook.remove()
            measured.append(float(1 - torch.cosine_similarity(before.double(), after.double(), dim=-1).mean()))
        estimate = 0.5 * 0.01**2 * float(found[name].sum())
        assert estimate == pytest.approx(np.mean(measured), rel=0.35), name
    assert "pooler.dense" not in found  # whatever it does, no state changes


def test_plan_of_an_encoder():
    torch.manual_seed(0)
    model, batches = make("bert").bert, model_and_batches()[1]
    ids = token_ids(512, seed=3).reshape(8, 64)
    with torch.no_grad():
        before = model(ids).last_hidden_state
    plan = qins.plan(model, batches, target_bits=6.0)
    assert 5.7 < plan.bits <= 6.0
    assert "estimated mean 1 - cosine of states" in str(plan)
    qins.calibrate(model, batches, plan=plan)
    with torch.no_grad():
        after = model(ids).last_hidden_state
    measured = float(1 - torch.cosine_similarity(before.double(), after.double(), dim=-1).mean())
    assert plan.kld == pytest.approx(measured, rel=0.6)


def test_hull():
    points = [
        Option(None, 8.0, 5.0),
        Option(64, 8.1, 4.9),
        Option(32, 8.2, 2.0),
        Option(1, 9.0, 3.0),
        Option(-1, 16, 0),
    ]
    assert [o.bits for o in hull(points)] == [8.0, 8.2, 16]
    assert hull([points[0]]) == [points[0]]


def test_allocation_is_the_best_that_fits(rng):
    """Compare with an exhaustive search on small problems."""
    for _ in range(20):
        found = {}
        for i in range(5):
            errors = np.sort(rng.random(3))[::-1].tolist()
            found[f"l{i}"] = [Option(None, 8.0, errors[0]), Option(64, 8.125, errors[1]), Option(32, 8.25, errors[2])]
        weights = dict.fromkeys(found, 100)
        plan = allocate(found, weights, target_bits=8.12)
        assert plan.bits <= 8.12 + 1e-12
        best = min(
            sum(o.kld for o in combination)
            for combination in itertools.product(*found.values())
            if sum(o.bits for o in combination) <= 5 * 8.12
        )
        step = max(a.kld - b.kld for o in found.values() for a, b in itertools.pairwise(hull(o)))
        assert plan.kld <= best + step  # a step that does not fit is not taken
        enough = allocate(found, weights, target_kld=plan.kld)
        assert enough.kld <= plan.kld
        assert enough.bits <= plan.bits + 0.05  # the last step may overshoot


def test_a_step_that_just_fits_is_taken():
    found = {name: [Option(None, 8.0, 1.0), Option(64, 8.25, 0.5)] for name in ("b", "a")}
    plan = allocate(found, {"a": 100, "b": 100}, target_bits=8.125)
    assert plan.bits == 8.125  # all of these numbers are exact
    assert plan.chosen["a"].group_size == 64  # of equal steps that of the first name, in whatever order they come
    assert plan.kld == 1.5


def test_plan_and_calibrate():
    model, batches = model_and_batches()
    with torch.no_grad():  # an insensitive layer, and a sensitive one
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-4)
        model.model.layers[1].mlp.down_proj.weight.mul_(10)
    plan = qins.plan(model, batches, target_bits=8.6)
    assert plan.bits <= 8.6
    chosen = {n.removeprefix("model.layers."): str(o) for n, o in plan.chosen.items()}
    assert chosen["0.mlp.down_proj"] == "log8"
    assert chosen["1.mlp.down_proj"] == "log8/32"
    reference = make("llama")
    reference.load_state_dict(model.state_dict())
    report = qins.calibrate(model, batches, plan=plan)
    assert {m.name: m.group_size for m in report.converted} == plan.group_sizes
    assert 8 * report.bytes_after / sum(plan.weights.values()) == pytest.approx(plan.bits)
    windows = list(token_ids(512, seed=3).reshape(8, 1, 64))
    with torch.no_grad():
        pairs = [(reference(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1)) for ids in windows]
    measured = [float((p.exp() * (p - q)).sum(-1)[:, :-1].mean()) for p, q in pairs]
    assert plan.kld == pytest.approx(sum(measured) / len(measured), rel=0.6)
    assert "bits per weight, estimated mean KL divergence" in str(plan)


@pytest.mark.parametrize("target", [5.0, 6.5])
def test_fewer_bits(target):
    """Sensitive layers get more bits; a plan may use every codec from log4 to log8."""
    model, batches = model_and_batches()
    with torch.no_grad():  # an insensitive layer, and a sensitive one
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-4)
        model.model.layers[1].mlp.down_proj.weight.mul_(10)
    plan = qins.plan(model, batches, target_bits=target)
    assert target - 0.3 < plan.bits <= target
    chosen = {n.removeprefix("model.layers."): o for n, o in plan.chosen.items()}
    assert chosen["0.mlp.down_proj"].codec == "log4"
    ladder = ["log4", "log5", "log6", "log8"]
    steps = {n: ladder.index(o.codec) for n, o in chosen.items()}
    assert steps["1.mlp.down_proj"] == max(steps.values()) > 0
    assert all(str(o).startswith(f"{o.codec}/") or str(o) == "log8" for o in chosen.values())
    report = qins.calibrate(model, batches, plan=plan)
    assert {m.name: (m.codec, m.group_size) for m in report.converted} == plan.formats
    assert plan.group_sizes == {n: size for n, (_, size) in plan.formats.items()}
    assert 8 * report.bytes_after / sum(plan.weights.values()) == pytest.approx(plan.bits)


def test_what_is_tried():
    packed = [(f"log{bits}", size) for bits in (6, 5, 4) for size in (32, 64)]
    assert candidate_formats(576, True) == [("log8", None), ("log8", 32), ("log8", 64), ("log8", 192), *packed]
    assert candidate_formats(576, False) == candidate_formats(576, True)[:4]
    assert candidate_formats(72, True) == [("log8", None), ("log6", 32), ("log5", 32), ("log4", 32)]
    assert candidate_formats(60, True) == [("log8", None)]  # cannot be packed


def test_layers_left_as_floats():
    model, batches = model_and_batches()
    half = model.bfloat16()
    plan = qins.plan(half, batches, target_bits=12.0)
    assert plan.left
    assert 8 < plan.bits <= 12
    report = qins.calibrate(half, batches, plan=plan)
    assert {s.name for s in report.skipped if s.reason == "left by the plan"} == set(plan.left)
    assert all(type(half.get_submodule(n)) is torch.nn.Linear for n in plan.left)


def test_least_bits_for_a_divergence():
    model, batches = model_and_batches()
    loose, tight = (qins.plan(model, batches, target_kld=k) for k in (1.0, 2e-5))
    assert {o.codec for o in loose.chosen.values()} == {"log4"}
    assert "log8" in {o.codec for o in tight.chosen.values()}
    assert tight.kld <= 2e-5
    assert tight.bits > loose.bits


def test_errors():
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match="expected one of target_bits and target_kld"):
        qins.plan(model, batches)
    with pytest.raises(ValueError, match=r"target_bits: expected at least 4\.\d+ for these layers, got 3"):
        qins.plan(model, batches, target_bits=3)
    with pytest.raises(ValueError, match=r"target_bits: expected at least 8\.\d+ for these layers, got 8.01"):
        qins.plan(model, batches, target_bits=8.01)
    with pytest.raises(ValueError, match="target_kld: expected at least"):
        qins.plan(model, batches, target_kld=-1.0)
    with pytest.raises(ValueError, match="plan: expected a model whose output has logits or last hidden states, got"):
        qins.plan(Pooled(make("bert").bert), batches, target_bits=9)
