"""Calibration of models: which codes are kept, what is rejected, rounds, resuming, and checkpoints."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from cases import long_but
from torch import nn

import qins
from qins.calibration import Choice, Store
from qins.calibration.activations import Layer, Statistics, cut, split
from qins.codec import ARRAYS, DAMPING, LOG_BITS, ErrorFeedback

transformers = pytest.importorskip("transformers")
from tiny import MODELS, make, outputs, same_state  # noqa: E402
from tokens import token_ids  # noqa: E402

pytestmark = pytest.mark.once


def batches(tokens=1024, seed=0):
    return cut(token_ids(tokens, seed=seed), tokens, 64)


class Net(nn.Module):
    """Two layers with a shared input, one that follows, one that is never used, and one that is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(160, 48)
        self.embed.weight.data = torch.randn(160, 12) @ torch.randn(12, 48)  # correlated, as activations are
        self.a, self.b = nn.Linear(48, 32), nn.Linear(48, 32, bias=False)
        self.c, self.unused = nn.Linear(32, 48), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(2):
            x = x + self.c(torch.tanh(self.a(x) + self.b(x)))
        return x


def recorded_inputs(model, data):
    """Return the inputs of each linear layer of a model, all tokens concatenated, in float64."""
    seen = {}
    hooks = [
        m.register_forward_hook(lambda _m, a, _y, n=n: seen.setdefault(n, []).append(a[0].detach().flatten(0, -2)))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for h in hooks:
        h.remove()
    return {n: torch.cat(x).double().numpy() for n, x in seen.items()}


@pytest.mark.parametrize(
    ("room", "codec"),
    [(1, "log8"), (48 * 48 * 4 + 1, "log8"), *((1 << 30, codec) for codec in LOG_BITS)],
)
def test_layers_get_the_codes_of_their_inputs(room, codec):
    """The number of rounds does not matter: statistics come from the float model."""
    model, data = Net(), batches()
    text = split(data)
    x = recorded_inputs(model, text.batches)
    weights = {n: m.weight.detach().numpy().copy() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = qins.calibrate(model, data, room=room, codec=codec, group_size=32)
    kept = {m.name: m for m in report.converted}
    assert list(kept) == ["a", "b", "c", "unused"]
    assert kept["unused"].kept == "nearest: the calibration text does not reach this layer"
    for name in ("a", "b", "c"):
        assert kept[name].kept == "calibrated"
        assert kept[name].error < 0.7 * kept[name].nearest_error
        e = ErrorFeedback(x[name].T @ x[name], DAMPING).encode(weights[name], codec, group_size=32)
        field = ARRAYS[codec][0]
        codes = model.get_submodule(name).get_buffer(field).numpy()
        assert (codes == e.fields[field]).mean() > 0.99  # sums in float32 move a few ties
        assert (kept[name].codec, kept[name].group_size) == (codec, 32)
    assert report.tokens == sum(b.numel() for b in text.batches)
    assert report.held_out == 128
    assert "3 of 4 layers have" in str(report)
    assert model(data[0]).isfinite().all()


def test_layers_that_cannot_be_packed_get_log8():
    model = Net()
    model.unused = nn.Linear(12, 8)
    report = qins.calibrate(model, batches(), codec="log4")
    assert [(m.name, m.codec, m.group_size) for m in report.converted] == [
        *((name, "log4", 32) for name in "abc"),
        ("unused", "log8", 64),
    ]
    assert "unused: log8 instead of log4: 12 inputs are not a multiple of 8" in str(report)
    assert model(batches()[0]).isfinite().all()


def test_wrong_codec():
    model = Net()
    with pytest.raises(ValueError, match="codec: expected one of log8, log6, log5, log4 to calibrate, got 'golden'"):
        qins.calibrate(model, batches(), codec="golden")
    with pytest.raises(ValueError, match="group_size: expected 32 or a multiple of 64 for codec 'log4', got 48"):
        qins.calibrate(model, batches(), codec="log4", group_size=48)
    assert type(model.a) is nn.Linear


def test_deterministic():
    one, other = Net(), Net()
    qins.calibrate(one, batches())
    qins.calibrate(other, batches())
    assert same_state(one, other)


def test_sequential_sees_codes():
    """Layers of later rounds are fitted to activations of the quantized earlier layers."""
    parallel, sequential = Net(), Net()
    begin = time.perf_counter()
    report = qins.calibrate(sequential, batches(), sequential=True, room=1)
    took = time.perf_counter() - begin
    assert 0 < report.seconds_statistics + report.seconds_rounding <= took
    assert min(report.seconds_statistics, report.seconds_rounding) > 0
    assert [m.name for m in report.converted] == ["a", "b", "c", "unused"]
    qins.calibrate(parallel, batches(), room=1)
    assert torch.equal(sequential.a.codes, parallel.a.codes)
    assert not torch.equal(sequential.c.codes, parallel.c.codes)


def test_a_layer_that_would_be_worse_keeps_the_nearest_codes():
    """The calibration data and the held-out data contradict each other."""
    model = nn.Sequential(nn.Linear(32, 16))
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    v = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    rare = torch.eye(32)[torch.arange(64) % 32]
    data = [x * 0.001 + v * torch.randn(64, 1) for _ in range(7)] + [rare]
    nearest = qins.encode(model[0].weight.detach().numpy())
    report = qins.calibrate(model, [d[None] for d in data], group_size=None)
    assert report.converted[0].kept.startswith("nearest: error feedback is no better")
    assert report.converted[0].error == report.converted[0].nearest_error
    np.testing.assert_array_equal(model[0].codes.numpy(), nearest.fields["codes"])


def test_shared_layers_and_weights():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.b.weight = self.a.weight
            self.again = self.c

    model = Tied()
    report = qins.calibrate(model, batches())
    assert model.again is model.c
    assert model.b.codes is model.a.codes
    assert model.a.bias is not None
    assert model.b.bias is None
    assert [m.name for m in report.converted] == ["a", "c", "unused"]
    assert ("b", "shares the codes of a module with the same weight") in [(s.name, s.reason) for s in report.skipped]


def test_modes_and_hooks_stay():
    model = Net().train()
    model.c.eval()
    calls = []
    model.a.register_forward_hook(lambda *_: calls.append(1))
    qins.calibrate(model, batches())
    assert model.training
    assert not model.c.training
    assert isinstance(model.a, qins.QINSLinear)
    calls.clear()
    model(batches()[0])
    assert len(calls) == 2


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name):
    """Every layer that runs is calibrated, from the model's own kind of input."""
    model = make(name)
    data = [{"input_ids": b} for b in batches()]
    if model.config.is_encoder_decoder:
        data = [d | {"decoder_input_ids": d["input_ids"][:, :32]} for d in data]
    report = qins.calibrate(model, data)
    named = {m.name for m in report.converted}
    assert named == {n for n, m in model.named_modules() if isinstance(m, qins.QINSLinear)}
    reached = [m for m in report.converted if "not reach" not in m.kept]
    assert len(reached) >= 0.8 * sum("visual" not in n for n in named)  # text does not reach vision layers
    better = sum(m.error for m in reached) / max(sum(m.nearest_error for m in reached), 1e-30)
    assert not reached or better < 1
    assert outputs(model).isfinite().all()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("name", long_but(["llama", "t5", "gpt2"], MODELS))
def test_rounds_do_not_matter(name, sequential, monkeypatch):
    """One layer per round, with blocks skipped, gives the same codes as whole passes, for every architecture."""
    data = [{"input_ids": b} for b in batches(512)]
    one, other = make(name), make(name)
    if one.config.is_encoder_decoder:
        data = [d | {"decoder_input_ids": d["input_ids"][:, :32]} for d in data]
    qins.calibrate(one, data, room=1, sequential=sequential)
    if sequential:
        monkeypatch.setattr("qins.calibration.blocks.BlockChain.run", lambda self, i, forward, **_: forward())
    qins.calibrate(other, data, room=1 if sequential else 1 << 30, sequential=sequential)
    assert same_state(one, other)


def test_blocks_are_passed_over():
    model = make("llama")
    first = model.model.layers[0].self_attn.q_proj
    calls = []
    first.register_forward_hook(lambda *_: calls.append(1))
    data = batches()
    qins.calibrate(model, data, room=1)
    # five rounds begin with the first block; the sixth learns the order of blocks and checks that it can be skipped
    assert len(calls) == 5 * len(data) + 2


def test_models_whose_blocks_share_more_run_whole():
    """A block reads state that the first block left elsewhere, so skipping the first block would be wrong."""

    class Block(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.linear, self.shared = nn.Linear(48, 48), shared

        def forward(self, hidden_states):
            out = hidden_states + torch.tanh(self.linear(hidden_states) + self.shared.get("sum", 0.0))
            self.shared["sum"] = self.shared.get("sum", 0.0) + out.mean()
            return out

    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.shared = {}
            self.embed = nn.Embedding(160, 48)
            self.blocks = nn.ModuleList(Block(self.shared) for _ in range(4))

        def forward(self, ids):
            self.shared.clear()
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return x

    one, other = Sharing(), Sharing()
    qins.calibrate(one, batches(), room=1)
    qins.calibrate(other, batches(), room=1 << 30)
    assert same_state(one, other)


def test_second_moments_of_wide_inputs():
    """They are added in parts, and are those of the whole."""
    layer, data = nn.Linear(1100, 2), torch.randn(3, 40, 1100)
    statistics = Statistics({"wide": Layer(layer, "log8", None)}, 0, lambda: None)
    for batch in data:
        statistics.run(lambda batch=batch: layer(batch))
    statistics.remove()
    x = data.reshape(-1, 1100).double()
    torch.testing.assert_close(statistics.take_gram("wide").double(), x.T @ x, rtol=1e-5, atol=1e-4)


def test_bad_text():
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="expected at least 256 tokens, got 100"):
        qins.calibrate(model, [token_ids(100)[None]])
    with pytest.raises(ValueError, match="expected at least 256 tokens, got 0"):
        qins.calibrate(model, [])
    with pytest.raises(ValueError, match="expected text with at least 32 different tokens, got 1"):
        qins.calibrate(model, [torch.full((4, 128), 7)] * 3)
    with pytest.raises(ValueError, match="expected at least 2 batches"):
        qins.calibrate(model, [token_ids(512)[None]])
    with pytest.raises(ValueError, match=r"held_out: expected a share from 0 to 0.5, got 0.9"):
        qins.calibrate(model, batches(), held_out=0.9)
    with pytest.raises(ValueError, match="a or b: gram: singular|a: gram: singular"):
        qins.calibrate(model, [token_ids(256)[None][:, :130]] * 4, damping=0.0, held_out=0.25)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tokens_of_speech_are_those_of_the_decoder():
    """Features, (batch, mel bins, frames), are no tokens."""
    data = [
        {"input_features": torch.zeros(2, 80, 300), "decoder_input_ids": ids}
        for ids in token_ids(1024).reshape(8, 2, 64)
    ]
    assert split(data).tokens == (7 * 128, 128)
    assert split([{"input_features": b["input_features"]} for b in data] * 2).tokens == (14 * 160, 2 * 160)


def test_bad_weights():
    model = Net()
    model.c.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="c: weights: expected finite"):
        qins.calibrate(model, batches())
    assert type(model.a) is nn.Linear


def test_infinite_activations_are_named():
    model = Net()
    model.embed.weight.data[10] = float("inf")
    with pytest.raises(ValueError, match="a: gram: expected finite numbers"):
        qins.calibrate(model, batches())


def test_no_held_out():
    report = qins.calibrate(Net(), batches(), held_out=0.0)
    assert report.held_out == 0
    assert all(m.kept == "calibrated" for m in report.converted if m.name != "unused")


def test_store(tmp_path):
    layer = Choice(qins.encode(np.ones((2, 8), np.float32), group_size=4), 0.5, 0.25)
    store = Store(tmp_path / "s", "one")
    store.put("model.layers.0.x", layer)
    again = Store(tmp_path / "s", "one").get("model.layers.0.x")
    assert (again.nearest_error, again.error, again.kept) == (0.5, 0.25, "calibrated")
    assert again.encoded.group_size == 4
    assert all(np.array_equal(again.encoded.fields[n], f) for n, f in layer.encoded.fields.items())
    assert store.get("another") is None
    with pytest.raises(FileExistsError, match="another model, with another text or other settings"):
        Store(tmp_path / "s", "two")
