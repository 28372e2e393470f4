"""What all tests share: a fixed number of threads, and every instruction set that runs here."""

from __future__ import annotations

import os

import numpy as np
import pytest

import qins


def pytest_report_header() -> str:
    known = {"amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "neon", "scalar"}
    missing = sorted(known - set(qins.isas()))
    return f"qins: using {qins.isa()}; runs here: {', '.join(qins.isas())}; NOT RUN, not on this processor: {missing}"


# `make test` runs the suite under each instruction set; what forces all of them need not run more than once.
FORCED = qins.isas() if os.environ.get("QINS_ISA") in (None, qins.isas()[0]) else (qins.isa(),)


@pytest.fixture(params=FORCED)
def isa(request):
    """Run the test on each instruction set in turn."""
    with qins.use_isa(request.param):
        yield request.param


@pytest.fixture
def rng():
    return np.random.default_rng(42)


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    yield
    qins.set_num_threads(None)


@pytest.fixture(scope="session")
def phi35_hub(tmp_path_factory):
    """Environment of a local hub cache that has microsoft/Phi-3.5-mini-instruct: SmolLM2's weights as a Phi-3 model."""
    import phi

    from qins.models import find_model, load_causal_lm

    model, tokenizer = load_causal_lm(find_model())
    return phi.save_to_hub_cache(phi.from_llama(model), tokenizer, tmp_path_factory.mktemp("hub"))
