"""The short form of the readers' fuzzing, in this process and without coverage; fuzz/run.sh is the long one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore")]


def load_readers():
    spec = importlib.util.spec_from_file_location("readers", Path(__file__).parent / "fuzz" / "readers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readers = load_readers()


@pytest.fixture(scope="module")
def targets():
    made = readers.Targets()
    yield made
    made.close()


@pytest.mark.parametrize("name", readers.NAMES)
def test_short(targets, monkeypatch, name):
    monkeypatch.chdir(targets.room)
    getattr(targets, name)(b"")  # imports
    once = readers.watched(targets, name)
    before = dict(targets.outcomes)
    inputs = [*readers.corpus_of(name), *readers.blind_inputs(100, 0)]
    for data in inputs:
        once(data)
    assert sum(targets.outcomes.values()) - sum(before.values()) >= len(inputs)
    assert targets.outcomes["refused"] > before["refused"]


def test_what_a_run_may_not_do_is_noticed(targets, monkeypatch):
    """Other errors, memory, and files elsewhere."""

    def unexpected(_):
        targets.read(lambda: {}["x"])

    def hungry(_):
        monkeypatch.setattr(readers, "memory", lambda: readers.MOST_MEMORY << 20)

    def elsewhere(_):
        (targets.work / "other").write_text("")

    monkeypatch.chdir(targets.room)
    for run, error in ((unexpected, KeyError), (hungry, AssertionError), (elsewhere, AssertionError)):
        monkeypatch.setattr(targets, "index", run)
        with pytest.raises(error):
            readers.watched(targets, "index")(b"")
    os.unlink(targets.work / "other")
