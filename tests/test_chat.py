"""qins generate and qins chat."""

from __future__ import annotations

import shutil

import pytest
import torch

import qins

transformers = pytest.importorskip("transformers")
testing = pytest.importorskip("typer.testing")
from test_hf import make  # noqa: E402
from tokens import save_tokenizer  # noqa: E402

from qins.chat import Conversation, Speaker  # noqa: E402
from qins.cli import app  # noqa: E402

pytestmark = pytest.mark.once

# w9, w8 and w6 stand for the roles; w7 asks for the answer
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w9', 'user': 'w8'}.get(m.role, 'w6') }} {{ m.content }} {% endfor %}w7"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    made = make("llama")
    made.save_pretrained(path / "float")
    quantised = type(made).from_pretrained(path / "float", quantization_config=qins.QinsConfig())
    quantised.save_pretrained(path / "model")
    save_tokenizer(path / "model")
    return path / "model"


def continued(model, words, tokens):
    """What the model says after these words, by hand."""
    loaded = qins.load(model).eval()
    ids = [int(w[1:]) for w in words.split()]
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(loaded(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:  # the end
            break
    return " ".join(f"w{i}" for i in ids[len(words.split()) :])


def run(*args, **kwargs):
    result = testing.CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False, **kwargs)
    assert result.exit_code == 0
    return result.stdout


def test_generate(model):
    said = run("generate", model, "-p", "w11 w12 w13", "--tokens", 6)
    assert said.removeprefix("w11 w12 w13").split() == continued(model, "w11 w12 w13", 6).split()


def test_sampling(model):
    speaker = Speaker(str(model), 12, 5.0)
    torch.manual_seed(0)
    assert len({speaker.say("w11 w12") for _ in range(4)}) > 1


def test_chat(model, tmp_path):
    """Each question has all that was said before in view; an empty line ends it."""
    talking = tmp_path / "model"
    shutil.copytree(model, talking)
    (talking / "chat_template.jinja").write_text(TEMPLATE)
    said = run("chat", talking, "--system", "w20", "--tokens", 5, input="w30 w31\nw32\n\nw33\n")
    first = continued(model, "w9 w20 w8 w30 w31 w7", 5)
    second = continued(model, f"w9 w20 w8 w30 w31 w6 {first} w8 w32 w7", 5)
    assert said.split() == [*first.split(), *second.split()]


def test_without_a_template(model):
    with pytest.raises(ValueError, match="has no chat template; qins generate continues a text"):
        Conversation(Speaker(str(model), 5, 0.0))
