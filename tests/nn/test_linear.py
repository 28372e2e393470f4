"""QINSLinear as a torch module."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

import qins
from qins import ops
from qins.codec import decode_on_device

CODECS = [("golden", None), ("log9", None), ("log8", None), ("log8", 128), ("log8", 32), ("rational", None)]
FIELDS = {
    "golden": ["stored", "sign", "log_min", "log_max"],
    "log9": ["stored", "sign_bits", "log_min", "log_max"],
    "log8": ["codes", "scale", "mu"],
    "rational": ["w_encoded", "alpha", "z_min", "z_max"],
}


def test_operators_state_their_schemas():
    # torch 2.4 infers none from annotations that are strings: it would stop the import
    program = """
import torch

def none(*unused, **also_unused):
    raise ValueError("no schema")

torch.library.infer_schema = none
import qins.nn.experts
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=CODECS, ids=lambda c: f"{c[0]}-{c[1]}")
def layer(request):
    torch.manual_seed(0)
    codec, group = request.param
    return qins.QINSLinear.from_linear(nn.Linear(300, 200), codec, group_size=group)


def relative_rms(y, exact):
    return float((y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("rows", [(), (1,), (2,), (5,), (3, 4), (17,), (64,), (2, 65), (0,)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-4), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_forward(layer, rows, dtype, limit):
    x = torch.randn(*rows, 300).to(dtype)
    with torch.no_grad():
        y = layer.to(dtype)(x)
    exact = functional.linear(x.double(), layer.to(torch.float32).weight.double(), layer.bias.to(dtype).double())
    assert y.dtype == dtype
    assert y.shape == (*rows, 200)
    if y.numel():
        assert relative_rms(y.detach(), exact.detach()) < limit


@pytest.fixture
def only_tiles():
    before = dict(ops._fused_rows)
    ops.set_fused_rows(0)
    yield
    ops._fused_rows.update(before)


@pytest.mark.usefixtures("only_tiles")
def test_tiles_cover_large_layers(layer):
    codec, group = layer.codec, layer.group_size
    big = nn.Linear(1 << 11, 600, bias=False)
    wide = nn.Linear(ops._SCRATCH_BYTES // 4 + 13, 2, bias=False)  # a row larger than the scratch buffer
    for linear in (big, wide):
        q = qins.QINSLinear.from_linear(linear, codec, group_size=group)
        weight = q.weight.double()
        x = torch.randn(5, linear.in_features)
        g = torch.randn(5, linear.out_features)
        assert relative_rms(ops.multiply_codes(x, fields(q), codec, group), x.double() @ weight.T) < 2e-4
        assert relative_rms(ops.multiply_codes_transposed(g, fields(q), codec, group), g.double() @ weight) < 1e-5


def fields(q):
    return [q._buffers[n] for n in ops.field_names(q.codec, q.group_size)]


def test_gradients(layer):
    x = torch.randn(7, 300, requires_grad=True)
    layer(x).square().sum().backward()
    again = x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    functional.linear(again, layer.weight, bias).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-3, atol=1e-3)


def test_gradcheck(layer):
    small = qins.QINSLinear.from_linear(nn.Linear(5, 4), layer.codec, group_size=layer.group_size).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(small, (x,))
    assert torch.autograd.gradgradcheck(small, (x,))


def test_bias_trains(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = torch.randn(16, 300), torch.randn(16, 200)
    losses = []
    for _ in range(5):
        loss = functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert [n for n, _ in layer.named_parameters()] == ["bias"]


def test_state_dict(layer):
    expected = {*FIELDS[layer.codec], "bias"} | ({"group_scale"} if layer.group_size else set())
    assert set(layer.state_dict()) == expected
    new = qins.QINSLinear(300, 200, codec=layer.codec, group_size=layer.group_size)
    assert new.load_state_dict(layer.state_dict()).missing_keys == []
    assert torch.equal(new.weight, layer.weight)
    x = torch.randn(3, 300)
    assert torch.equal(new(x), layer(x))


def test_other_groups_are_refused_by_name():
    """The default group size was larger once."""
    old = nn.Sequential(qins.QINSLinear.from_linear(nn.Linear(576, 20), group_size=192)).state_dict()
    new = nn.Sequential(qins.QINSLinear(576, 20))
    expected = r"0.group_scale: expected 9 groups in a row, of group_size 64, got shape \(20, 3\); pass the group_size"
    with pytest.raises(RuntimeError, match=expected):
        new.load_state_dict(old)
    nn.Sequential(qins.QINSLinear(576, 20, group_size=192)).load_state_dict(old)


def test_load_state_dict_errors(layer):
    new = qins.QINSLinear(300, 200, codec=layer.codec, group_size=layer.group_size)
    state = layer.state_dict()
    first = FIELDS[layer.codec][0]
    with pytest.raises(RuntimeError, match=f"size mismatch for {first}"):
        qins.QINSLinear(301, 200, codec=layer.codec, group_size=layer.group_size).load_state_dict(state)
    with pytest.raises(RuntimeError, match=rf"Missing key.*{first}"):
        new.load_state_dict({n: t for n, t in state.items() if n != first})
    with pytest.raises(TypeError, match=f"{first}: expected dtype torch.uint8, got torch.float32"):
        new.load_state_dict({**state, first: state[first].float()})
    with pytest.raises(RuntimeError, match="weight: expected codes .*got a float weight"):
        new.load_state_dict(nn.Linear(300, 200).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        new.load_state_dict({**state, "extra": torch.zeros(1)})


def test_copies(layer):
    x = torch.randn(2, 300)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(x), layer(x))
        assert twin.extra_repr() == layer.extra_repr()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(twin.state_dict()[name], tensor)
            assert twin.state_dict()[name].data_ptr() != tensor.data_ptr()


def test_casts_keep_the_codes(layer):
    before = {n: t.clone() for n, t in layer.named_buffers()}
    weight = layer.weight
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.float()):
        cast(layer)
        assert layer.weight.dtype == layer.bias.dtype
        assert all(torch.equal(before[n], t) and before[n].dtype == t.dtype for n, t in layer.named_buffers())
    assert torch.equal(layer.weight, weight)
    parent = nn.Sequential(layer).to(torch.bfloat16)
    assert parent[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(before[n], t) for n, t in layer.named_buffers())


def test_meta_device(layer):
    meta = qins.QINSLinear(300, 200, codec=layer.codec, group_size=layer.group_size, device="meta")
    assert all(t.is_meta for t in meta.state_dict().values())
    assert meta.weight.is_meta
    assert meta.weight.shape == (200, 300)
    assert meta(torch.empty(4, 300, device="meta")).shape == (4, 200)
    assert qins.QINSLinear.from_linear(nn.Linear(3, 2, device="meta")).weight.is_meta
    meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(meta.weight, layer.weight)
    moved = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in moved.state_dict().values())
    with torch.device("meta"):
        assert qins.QINSLinear(3, 2).codes.is_meta


def test_decode_with_torch_operations(layer):
    """Run on the CPU the torch operations that other devices decode with."""
    decoded = decode_on_device(layer.codec, layer.group_size, fields(layer), torch.float32)
    assert torch.equal(decoded, layer.weight)


def test_new_layer_is_zero_or_the_codecs_nearest():
    x = torch.randn(2, 6)
    for codec, group in CODECS:
        fresh = qins.QINSLinear(6, 3, codec=codec, group_size=group)
        assert fresh.encoded.shape == (3, 6)  # every field is valid
        zeros = qins.QINSLinear.from_linear(nn.Linear(6, 3, bias=False), codec, group_size=group)
        nn.init.zeros_(zeros.bias) if zeros.bias is not None else None
        assert torch.equal(fresh.weight, torch.from_numpy(qins.encode(torch.zeros(3, 6), codec).decode()))
        assert fresh(x).shape == (2, 3)


def test_modes_and_repr(layer):
    assert not layer.eval().training
    assert layer.train().training
    assert f"in_features=300, out_features=200, bias=True, codec={layer.codec}" in repr(layer)
    assert isinstance(layer, nn.Linear)


def test_weight_is_read_only(layer):
    with pytest.raises(AttributeError, match="decoded from its codes"):
        layer.weight = torch.zeros(200, 300)
    with pytest.raises(AttributeError, match="decoded from its codes"):
        layer.weight = nn.Parameter(torch.zeros(200, 300))
    with pytest.raises(RuntimeError, match="cannot be re-initialized"):
        layer.reset_parameters()


def test_threads_share_a_layer(layer):
    x = torch.randn(9, 300)
    with torch.no_grad():
        expected = layer(x)
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(layer(x), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_and_tiles_agree(layer, dtype):
    """On either side of the crossover the product is the same, within the precision of the dtype."""
    before = dict(ops._fused_rows)
    exact = layer.weight.double()
    try:
        for rows in (1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 40, 100, 520):
            x = torch.randn(rows, 300).to(dtype)
            for fused in (0, 1000):
                ops.set_fused_rows(fused)
                y = ops.multiply_codes(x, fields(layer), layer.codec, layer.group_size)
                limit = {torch.float32: 2e-4, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
                assert relative_rms(y, x.double() @ exact.T) < limit
    finally:
        ops._fused_rows.update(before)


@pytest.mark.parametrize("outlier", [False, True])
def test_fused_product_is_accurate_and_independent_of_threads(layer, outlier):
    torch.manual_seed(1)
    big = qins.QINSLinear.from_linear(nn.Linear(576, 1000, bias=False), layer.codec, group_size=layer.group_size)
    for rows in (1, 4, 8, 11, 40):
        x = torch.randn(rows, 576)
        if outlier:
            x[:, 100] *= 1000
        results = []
        for threads in (1, 2, 3, 8):
            qins.set_num_threads(threads)
            results.append(ops.multiply_codes(x, fields(big), big.codec, big.group_size))
        assert all(torch.equal(r, results[0]) for r in results)
        assert relative_rms(results[0], x.double() @ big.weight.double().T) < 2e-4


def test_activations_that_are_not_finite(layer):
    for bad in (float("nan"), float("inf")):
        for rows in (3, 20, 70):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.ones(rows, 300, dtype=dtype)
                x[1, 7] = bad
                y = layer(x)
                assert not y[1].isfinite().any()
                assert y[[i for i in range(rows) if i != 1]].isfinite().all()


def test_strided_activations(layer):
    x = torch.randn(300, 4).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=0)
    x = torch.randn(4, 600)[:, ::2]
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=0)


def test_set_fused_rows_errors():
    with pytest.raises(ValueError, match="rows: expected an integer >= 0"):
        ops.set_fused_rows(-1)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        ops.set_fused_rows(3, torch.int8)


def test_scratch_is_bounded():
    assert ops._SCRATCH_BYTES * ops._SCRATCHES <= 32e6


def test_autocast(layer):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = layer(torch.randn(3, 300))
    assert y.dtype == torch.bfloat16


@pytest.mark.long
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(layer, grad):
    for op, size in ((torch.ops.qins.linear.default, 300), (torch.ops.qins.linear_backward.default, 200)):
        x = torch.randn(3, size, requires_grad=grad)
        torch.library.opcheck(op, (x, fields(layer), layer.codec, layer.group_size or 0))


def test_compile_has_no_graph_break(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 300)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-3, atol=1e-4)
    exported = torch.export.export(nn.Sequential(layer), (x,))
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-3, atol=1e-4)


def test_errors():
    with pytest.raises(TypeError, match="linear: expected an nn.Linear, got ReLU"):
        qins.QINSLinear.from_linear(nn.ReLU())
    with pytest.raises(ValueError, match="codec: expected one of"):
        qins.QINSLinear(2, 2, codec="int8")
    with pytest.raises(ValueError, match="group_size"):
        qins.QINSLinear(2, 2, codec="golden", group_size=32)
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 4\), got \(2, 3\)"):
        qins.QINSLinear(4, 2)(torch.zeros(2, 3))
    bad = nn.Linear(2, 2)
    with torch.no_grad():
        bad.weight[1, 0] = float("inf")
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        qins.QINSLinear.from_linear(bad)


def test_shared_bias_is_the_same_parameter():
    linear = nn.Linear(4, 2)
    assert qins.QINSLinear.from_linear(linear).bias is linear.bias


@pytest.mark.once
def test_slow_group_sizes_warn(tmp_path):
    def suggested(size):
        with pytest.warns(UserWarning, match=f"^group_size {size}: products decode") as found:
            qins.QINSLinear.from_linear(nn.Linear(300, 20), group_size=size)
        assert len(found) == 1
        return re.search(r"expected (.*) \(", str(found[0].message))[1]

    assert {s: suggested(s) for s in (1, 48, 65, 100, 1000)} == {
        1: "32", 48: "32 or 64", 65: "64 or 128", 100: "64 or 128", 1000: "960 or 1024",
    }  # fmt: skip
    for size in (None, 32, 64, 128, 192, 640, "default"):
        qins.QINSLinear.from_linear(nn.Linear(300, 20), group_size=size)
    qins.QINSLinear.from_linear(nn.Linear(300, 20), "golden")
    with pytest.warns(UserWarning, match="group_size 100") as found:
        qins.convert(nn.Sequential(nn.Linear(300, 20), nn.Linear(20, 20)), group_size=100)
    assert len(found) == 1
    with pytest.warns(UserWarning, match="group_size 100"):
        qins.QINSEmbedding.from_embedding(nn.Embedding(30, 200), group_size=100)
