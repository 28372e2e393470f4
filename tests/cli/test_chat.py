"""qins generate and qins chat."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

import qins

transformers = pytest.importorskip("transformers")
testing = pytest.importorskip("typer.testing")
from terminal import printed  # noqa: E402

from qins.cli import app  # noqa: E402
from qins.cli.chat import Conversation, Speaker  # noqa: E402

pytestmark = pytest.mark.once

# w9, w8 and w6 stand for the roles; w7 asks for the answer
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w9', 'user': 'w8'}.get(m.role, 'w6') }} {{ m.content }} {% endfor %}w7"
)


def continued(model, words, tokens):
    """Return the model's continuation of these words, computed by hand."""
    loaded = qins.load(model).eval()
    ids = [int(w[1:]) for w in words.split()]
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(loaded(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:  # end of sequence
            break
    return " ".join(f"w{i}" for i in ids[len(words.split()) :])


def test_generate(model):
    said = printed("generate", model, "-p", "w11 w12 w13", "--tokens", 6)
    assert said.removeprefix("w11 w12 w13").split() == continued(model, "w11 w12 w13", 6).split()


def test_sampling(model):
    speaker = Speaker(str(model), 12, 5.0)
    torch.manual_seed(0)
    assert len({speaker.say("w11 w12") for _ in range(4)}) > 1


def test_chat(model, tmp_path):
    """The model sees the whole conversation with each question; an empty line ends it."""
    talking = tmp_path / "model"
    shutil.copytree(model, talking)
    (talking / "chat_template.jinja").write_text(TEMPLATE)
    said = printed("chat", talking, "--system", "w20", "--tokens", 5, input="w30 w31\nw32\n\nw33\n")
    first = continued(model, "w9 w20 w8 w30 w31 w7", 5)
    second = continued(model, f"w9 w20 w8 w30 w31 w6 {first} w8 w32 w7", 5)
    assert said.split() == [*first.split(), *second.split()]


def test_without_a_template(model):
    with pytest.raises(ValueError, match="has no chat template; use qins generate to continue a text"):
        Conversation(Speaker(str(model), 5, 0.0))


@pytest.fixture(scope="module")
def talking(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("talking") / "model"
    shutil.copytree(model, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def test_prompt_of_a_file_or_stdin(model, tmp_path):
    (tmp_path / "prompt.txt").write_text("w11 w12 w13")
    expected = printed("generate", model, "-p", "w11 w12 w13", "--tokens", 4)
    assert printed("generate", model, "--file", tmp_path / "prompt.txt", "--tokens", 4) == expected
    assert printed("generate", model, "--tokens", 4, input="w11 w12 w13") == expected
    assert printed("generate", model, "-p", "-", "--tokens", 4, input="w11 w12 w13") == expected


def test_json(model, talking):
    said = json.loads(printed("generate", model, "-p", "w11 w12 w13", "--tokens", 6, "--json"))
    assert said["text"] == continued(model, "w11 w12 w13", 6)
    assert (said["model"], said["prompt"], said["prompt_tokens"]) == (str(model), "w11 w12 w13", 3)
    assert 1 <= said["tokens"] <= 6
    assert said["prompt_seconds"] > 0
    assert said["seconds"] >= 0
    turns = [
        json.loads(line) for line in printed("chat", talking, "--json", "--tokens", 3, input="w30\nw31\n").splitlines()
    ]
    assert [t["prompt"].split()[-2] for t in turns] == ["w30", "w31"]


def test_generate_in_the_chat_template(model, talking):
    said = printed("generate", talking, "-p", "w30", "--system", "w20", "--tokens", 4)
    assert said.split() == continued(model, "w9 w20 w8 w30 w7", 4).split()
    assert (
        printed("generate", talking, "-p", "w30", "--chat", "--tokens", 4).split()
        == continued(model, "w8 w30 w7", 4).split()
    )
    with pytest.raises(ValueError, match="has no chat template"):
        printed("generate", model, "-p", "w30", "--chat")


def test_sampling_options(model):
    drawn = ["generate", model, "-p", "w11", "--tokens", 8, "--temperature", 5.0]
    assert printed(*drawn, "--seed", 1) == printed(*drawn, "--seed", 1)
    assert printed(*drawn, "--seed", 1) != printed(*drawn, "--seed", 2)
    greedy = printed(*drawn[:-2])
    for option in (["--top-k", 1], ["--top-p", 0.0], ["--min-p", 1.0]):  # each leaves only the most likely token
        assert printed(*drawn, *option) == greedy
    assert printed(*drawn[:-2], "--repetition-penalty", 100.0) != greedy
    with pytest.raises(ValueError, match="top-p: expected --temperature above 0 with it"):
        printed(*drawn[:-2], "--top-p", 0.5)
    wrong = testing.CliRunner().invoke(app, [str(a) for a in [*drawn, "--top-p", 2]])
    assert wrong.exit_code == 2
    assert "--top-p" in wrong.stderr


def test_stop(model, tmp_path):
    stopping = tmp_path / "model"
    shutil.copytree(model, stopping)
    vocabulary = stopping / "tokenizer.json"  # transformers finds stop strings by this word in it
    vocabulary.write_text(vocabulary.read_text().replace('"w159"', '"abcdef"'))
    words = continued(model, "w11 w12 w13", 6).split()
    said = json.loads(
        printed(
            "generate", stopping, "-p", "w11 w12 w13", "--tokens", 6, "--stop", "w999", "--stop", words[1], "--json"
        )
    )
    assert said["text"].split() == words[: words.index(words[1]) + 1]


def test_a_damaged_tokenizer_is_named(model, tmp_path):
    damaged = tmp_path / "model"
    shutil.copytree(model, damaged)
    whole = (damaged / "tokenizer.json").read_text()
    (damaged / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=re.escape(f"{damaged / 'tokenizer.json'}: not readable as JSON")):
        Speaker(str(damaged), 4, 0.0)


def test_stop_with_a_tokenizer_that_cannot(model):
    with pytest.raises(ValueError, match="stop: expected a tokenizer that transformers can match stop strings with"):
        Speaker(str(model), 4, 0.0, stop_strings=["w7 w8"])


def test_verbose_and_ctrl_c(model, monkeypatch):
    result = testing.CliRunner().invoke(app, ["generate", str(model), "-p", "w11", "--tokens", "4", "-v"])
    assert "prompt of 1 tokens in" in result.stderr

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Speaker, "say", interrupted)
    result = testing.CliRunner().invoke(app, ["generate", str(model), "-p", "w11"])
    assert (result.exit_code, result.stdout) == (130, "w11\n")
