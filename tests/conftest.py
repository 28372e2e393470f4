"""Shared fixtures: a fixed number of threads, and every instruction set that runs here."""

from __future__ import annotations

import gc
import importlib.abc
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import qins

# Names that are no directories are looked for on the hub, half a minute long where it cannot be reached.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Hidden(importlib.abc.MetaPathFinder):
    """Hides rooms as if they had been deleted."""

    def __init__(self, rooms: set[str]) -> None:
        self.rooms = rooms

    def find_spec(self, name, path, target=None):
        if name.startswith("qins.") and name.split(".")[1] in self.rooms:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--room", help="run the tests of this room of the package, with those above it hidden")
    parser.addoption("--first", action="store_true", help="run each test with its first parameters only")
    parser.addoption("--first-test", action="store_true", help="run the first test of each file only")


def pytest_configure(config: pytest.Config) -> None:
    room = config.getoption("room")
    if room is None:
        return
    from layers import LEVELS, above  # here, because copies of the core's tests alone lack this file

    rooms = [name for level in LEVELS for name in level]
    if room not in rooms:
        raise pytest.UsageError(f"--room: expected one of {', '.join(rooms)}, got {room}")
    hidden = above(room)
    loaded = {name.split(".")[1] for name in sys.modules if name.startswith("qins.")} & hidden
    assert not loaded, f"imported already: {loaded}"
    sys.meta_path.insert(0, Hidden(hidden))
    config.args[:] = [str(Path(__file__).parent / room)]


@pytest.hookimpl(trylast=True)  # a test that -m or -k leaves out is not the first one
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    of_file = config.getoption("first_test")
    if not of_file and not config.getoption("first"):
        return
    first: dict[tuple[Path, object], pytest.Item] = {}
    for item in items:
        first.setdefault((item.path, None if of_file else getattr(item, "function", item)), item)
    config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
    items[:] = first.values()


def pytest_collection_finish() -> None:
    """Exempt what imports have made from garbage collection, which looks at half a million objects each time."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    known = {"amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "neon", "scalar"}
    missing = sorted(known - set(qins.isas()))
    return f"qins: using {qins.isa()}; runs here: {', '.join(qins.isas())}; NOT RUN, not on this processor: {missing}"


# `make test` runs the suite under each instruction set; tests that force all of them need to run only once.
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
    """Environment with a local hub cache; its microsoft/Phi-3.5-mini-instruct is a Phi-3 with SmolLM2's weights."""
    import phi

    from qins.hf import find_model, load_causal_lm

    model, tokenizer = load_causal_lm(find_model())
    return phi.save_to_hub_cache(phi.from_llama(model), tokenizer, tmp_path_factory.mktemp("hub"))
