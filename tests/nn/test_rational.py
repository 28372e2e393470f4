"""The rational codec in models: the seed's layer, its conversion and its check."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from qins import rational

pytestmark = pytest.mark.filterwarnings("ignore:.*rational codec is deprecated:DeprecationWarning")


def test_everything_warns_and_points_to_log8():
    linear = nn.Linear(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (
            lambda: rational.qins_encode(np.ones(2, np.float32)),
            lambda: rational.qins_decode(np.ones(2, np.float32)),
            lambda: rational.QINSWeightLinear(linear),
            lambda: rational.convert_linear_to_qins(nn.Sequential(linear), [""], verbose=False),
        ):
            with pytest.raises(DeprecationWarning, match="log8"):
                call()


@pytest.mark.parametrize("bias", [True, False])
def test_layer(bias):
    torch.manual_seed(0)
    linear = nn.Linear(300, 200, bias=bias)
    layer = rational.QINSWeightLinear(linear, alpha=2.0)
    assert layer.w_encoded.dtype == torch.uint8
    assert layer.w_encoded.shape == (200, 300)
    assert layer.bias is linear.bias
    x = torch.randn(3, 5, 300)
    with torch.no_grad():
        exact = nn.functional.linear(x.double(), layer.decode_weight().double())
        exact = exact + linear.bias.double() if bias else exact
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    checked = rational.verify_qins_layer(linear, layer)
    assert checked["passed"]
    assert checked["weight_snr_db"] > 40
    assert checked["signs_preserved"] == 1.0
    assert checked["bytes_per_weight"] < 1.001
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    assert all(torch.equal(before[n], t) for n, t in layer.state_dict().items() if n != "bias")
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert "alpha=2," in repr(layer)


def test_layer_without_quantization():
    torch.manual_seed(0)
    linear = nn.Linear(30, 20)
    layer = rational.QINSWeightLinear(linear, quantize=False)
    assert layer.w_encoded.dtype == torch.float32
    torch.testing.assert_close(layer.decode_weight(), linear.weight.detach(), rtol=1e-5, atol=1e-6)
    assert rational.verify_qins_layer(linear, layer, torch.randn(2, 30), tolerance=1e-5)["passed"]


def test_operations_on_codes_keep_their_range():
    codes = rational.qins_encode(torch.randn(6, 8), 2.0, quantize=True)
    plain = codes.as_subclass(torch.Tensor)
    turned = torch.flip(codes, dims=[0])
    assert (turned.z_min, turned.z_max) == (codes.z_min, codes.z_max)
    decoded = rational.qins_decode(codes, 2.0, is_quantized=True)
    assert torch.equal(rational.qins_decode(turned, 2.0, is_quantized=True), decoded.flip(0))
    assert type(codes.sum(dim=0)) is torch.Tensor
    assert torch.equal(codes.sum(dim=0), plain.sum(dim=0))


def test_layer_trains_its_input():
    layer = rational.QINSWeightLinear(nn.Linear(16, 4))
    x = torch.randn(2, 16, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.decode_weight().sum(0).expand(2, 16), rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.up_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.shared = self.v_proj


def test_convert(capsys):
    model = nn.ModuleList([Block(), Block()])
    assert rational.convert_linear_to_qins(model, alpha=3.0) is model
    said = capsys.readouterr().out
    assert "4 layers" in said
    assert "  1.up_proj: (8, 8)" in said
    for block in model:
        assert type(block.q_proj) is nn.Linear
        assert isinstance(block.v_proj, rational.QINSWeightLinear)
        assert block.v_proj.alpha == 3.0
        assert isinstance(block.up_proj, rational.QINSWeightLinear)
    rational.convert_linear_to_qins(model, ["0.q_proj"], verbose=False)
    assert isinstance(model[0].q_proj, rational.QINSWeightLinear)
    assert type(model[1].q_proj) is nn.Linear
    assert capsys.readouterr().out == ""
