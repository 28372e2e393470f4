"""Round trips through both codecs and a KV cache, as in the seed's tests."""

import torch
import torch.nn as nn
from qins_codec import QINSCodec, QINSKVCache, QINSLinear
from src.qins_weight_codec import qins_decode, qins_encode

torch.manual_seed(0)
weight = torch.randn(128, 256) * 0.02
stored, sign, log_min, log_max = QINSCodec.encode(weight)
assert stored.dtype == torch.uint8 and sign.dtype == torch.int8, "quantised"
assert stored.min() >= 1 and set(sign.unique().tolist()) == {-1, 1}
largest = weight.abs().argmax()
assert stored.flatten()[largest] == 1, "inverse magnitude"
decoded = QINSCodec.decode(stored, sign, log_min, log_max)
assert (torch.sign(decoded) == torch.sign(weight)).all(), "signs"
relative = ((decoded - weight).abs() / weight.abs()).mean().item()
print(f"golden: mean relative error {relative:.4f}")
assert relative < 0.02

linear = nn.Linear(256, 128)
layer = QINSLinear.from_linear(linear)
x = torch.randn(4, 256)
print(f"layer: output error {(layer(x) - linear(x)).norm() / linear(x).norm():.4f}")
empty = QINSLinear(256, 128)
empty.load_state_dict(layer.state_dict())
assert torch.equal(empty(x), layer(x))
assert list(layer.state_dict()) == ["stored", "sign", "log_min", "log_max", "bias"] or "bias" in layer.state_dict()

z = qins_encode(weight, alpha=1.0)
assert torch.allclose(qins_decode(z, alpha=1.0), weight, atol=1e-6)
codes = qins_encode(weight, alpha=1.0, quantize=True)
assert codes.dtype == torch.uint8
error = (qins_decode(codes, alpha=1.0, is_quantized=True) - weight).norm() / weight.norm()
print(f"rational: error {error:.4f}")
assert error < 0.018

cache = QINSKVCache(max_batch_size=2, max_seq_len=64, n_heads=4, head_dim=32)
k, v = torch.randn(2, 4, 10, 32), torch.randn(2, 4, 10, 32)
cache.update(k, v)
cache.update(k[:, :, :1], v[:, :, :1])
ks, vs = cache.get_kv(2)
assert ks.shape == vs.shape == (2, 4, 11, 32)
print(
    f"cache: K error {(ks[:, :, :10] - k).norm() / k.norm():.5f}, V error {(vs[:, :, :10] - v).norm() / v.norm():.5f}"
)
print(cache.memory_savings())
print("ALL PASSED")
