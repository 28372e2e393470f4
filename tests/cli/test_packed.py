"""The commands on codes of fewer than 8 bits."""

from __future__ import annotations

import json

import pytest

import qins

pytest.importorskip("transformers")
pytest.importorskip("typer.testing")
pytest.importorskip("tokenizers")
from terminal import printed
from tokens import save_tokenizer, sharp_llama
from tokens import text as words

pytestmark = pytest.mark.once
PROMPT = "w11 w12 w13"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float model and a text; codes of it are in `log4` beside it."""
    path = tmp_path_factory.mktemp("packed") / "float"
    sharp_llama().save_pretrained(path)
    save_tokenizer(path)
    (path.parent / "text.txt").write_text(words(2048))
    printed("quantize", path, path.parent / "log4", "--codec", "log4", "--lm-head", "--embeddings")
    return path


def test_inspect(source):
    report = json.loads(printed("inspect", source.parent / "log4", "--against", source, "--histogram", "--json"))
    assert not report["problems"]
    assert {(e["codec"], e["group_size"]) for e in report["layers"]} == {("log4", 32)}
    shapes = {e["name"]: e["shape"] for e in report["layers"]}
    assert shapes["model.layers.0.mlp.down_proj"] == [64, 96]
    assert shapes["model.embed_tokens"] == [160, 64]
    assert all(18 < e["snr_db"] < 23 for e in report["errors"] if e["name"] in shapes)
    assert all(sum(h) for h in report["histograms"].values())
    assert "log4/32" in printed("inspect", source.parent / "log4")


def test_eval(source):
    arguments = ["--text", source.parent / "text.txt", "--tokens", 200, "--window", 64, "--json"]
    found = json.loads(printed("eval", source.parent / "log4", "--against", source, *arguments))
    (measured,) = found["models"]
    assert 4.5 < measured["bits"] < 5
    assert measured["fidelity"]["kl_mean"] < 0.5
    made = json.loads(printed("eval", source, "--codec", "log4", "--codec", "log6", "--no-peers", *arguments))
    assert [m["name"] for m in made["models"]] == ["log4", "log6"]
    assert made["models"][0]["fidelity"]["kl_mean"] > made["models"][1]["fidelity"]["kl_mean"]


def test_generate(source):
    arguments = ["generate", source.parent / "log4", "-p", PROMPT, "--tokens", 12]
    assert printed(*arguments, "--engine", "core").split() == printed(*arguments).split()


def test_demo(source, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "demo.png"
    printed("demo", "--model", source, "--codec", "log4", "--tokens", 64, "--picture", picture)
    assert picture.stat().st_size > 1000


def test_calibrate(source, tmp_path):
    text = ["--calibrate", source.parent / "text.txt", "--calibration-tokens", 1024]
    printed("quantize", source, tmp_path / "out", "--codec", "log5", "--group-size", 64, *text)
    layers = [m for m in qins.load(tmp_path / "out").modules() if isinstance(m, qins.QINSLinear)]
    assert {(m.codec, m.group_size) for m in layers} == {("log5", 64)}
