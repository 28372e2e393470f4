"""The measures of `qins eval` and `qins demo`."""

from __future__ import annotations

import copy

import pytest

import qins
from qins.fidelity import bytes_by_component

pytest.importorskip("transformers")
from tiny_experts import MODELS, make

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_experts(name):
    model = make(name)
    quantized = copy.deepcopy(model)
    qins.convert(quantized)
    kinds = [bytes_by_component(m) for m in (model, quantized)]
    assert all("experts" in k for k in kinds)
    assert kinds[0]["experts"] > 1.8 * kinds[1]["experts"]
