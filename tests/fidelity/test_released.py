"""Models whose original was released in 8 or 4 bits are measured against its dequantized floats."""

from __future__ import annotations

import pytest

from qins.checkpoint import quantize_checkpoint
from qins.fidelity import evaluation

transformers = pytest.importorskip("transformers")
from released import released  # noqa: E402
from tokens import save_tokenizer, sharp_llama, text  # noqa: E402

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", ["fp8 block", "ct int4 asymmetric"])
def test_against_its_floats(tmp_path, name):
    source, floats = released(tmp_path, sharp_llama(), name)
    quantize_checkpoint(source, tmp_path / "out")
    found = []
    for original in (source, floats):
        save_tokenizer(original)
        settings = evaluation.Settings(text(400), tokens=200, window=64, new_tokens=4, show_progress=False)
        save_tokenizer(tmp_path / "out")
        (measured,) = evaluation.evaluate_one(str(tmp_path / "out"), str(original), settings).measured
        found.append(measured)
    assert found[0].distances.equal(found[1].distances)
    assert 0 < float(found[0].distances.mean()) < 1e-2
    assert found[0].layers == found[1].layers
    snr = [about["weight_snr_db"] for about in found[0].layers.values() if "weight_snr_db" in about]
    assert len(snr) == 14
    assert all(40 < s < 60 for s in snr)
