"""Memory of a converted model by dtype and by layer, with parameters and buffers separate."""

import os
import sys
from collections import defaultdict

import torch
import torch.nn as nn

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "src"))
from helpers import banner
from qins_codec import QINSLinear

model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
for i in (0, 2):
    model[i] = QINSLinear.from_linear(model[i])
model(torch.randn(2, 512))  # must leave no decoded copy behind

totals = defaultdict(int)
for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
    for name, t in tensors:
        totals[kind, t.dtype] += t.numel() * t.element_size()
        print(f"{name:12} {kind:9} {t.dtype!s:14} {tuple(t.shape)}")
weights = 2 * 512 * 1024
assert totals["buffer", torch.uint8] == weights and totals["buffer", torch.int8] == weights
hidden = [n for m in model.modules() for n, v in vars(m).items() if isinstance(v, torch.Tensor)]
assert not hidden, hidden
print(banner(f"{4 * weights / (2 * weights):.2f}x on encoded weights"))
