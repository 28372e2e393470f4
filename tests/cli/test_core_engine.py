"""qins generate --engine core, beside the same command with torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer.testing")
pytest.importorskip("tokenizers")
from terminal import printed

pytestmark = pytest.mark.once
PROMPT = "w11 w12 w13"


def test_same_text(model):
    arguments = ["generate", model, "-p", PROMPT, "--tokens", 12]
    assert printed(*arguments, "--engine", "core").split() == printed(*arguments).split()


def test_json_and_stop(model):
    words = printed("generate", model, "-p", PROMPT, "--tokens", 12).removeprefix(PROMPT).split()
    arguments = ["generate", model, "-p", PROMPT, "--tokens", 12, "--engine", "core", "--json"]
    told = json.loads(printed(*arguments))
    assert told["text"].split() == words
    assert (told["prompt_tokens"], told["tokens"]) == (3, 12)
    assert told["tokens_per_second"] > 0
    stopped = json.loads(printed(*arguments, "--stop", words[4]))
    assert stopped["text"].split() == words[: words.index(words[4]) + 1]


def test_sampling_is_reproducible(model):
    arguments = [
        "generate",
        model,
        "-p",
        PROMPT,
        "--engine",
        "core",
        "--temperature",
        1,
        "--min-p",
        0.01,
        "--top-k",
        50,
    ]
    assert printed(*arguments, "--seed", 1) == printed(*arguments, "--seed", 1) != printed(*arguments, "--seed", 2)


def test_without_torch(model):
    code = (
        "import sys\nfrom qins import cli\n"
        f"sys.argv = ['qins', 'generate', {str(model)!r}, '-p', {PROMPT!r}, '--engine', 'core', '--tokens', '3']\n"
        "try: cli.main()\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(PROMPT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--chat"], "chat: --engine core does not have it"),
        (["--repetition-penalty", "1.1"], "repetition-penalty: --engine core does not have it"),
        (["--top-k", "5"], "top-k: expected --temperature above 0 with it"),
    ],
    ids=str,
)
def test_wrong_options(model, options, said):
    with pytest.raises(ValueError, match=said):
        printed("generate", model, "-p", PROMPT, "--engine", "core", *options)


def test_wrong_models(model, tmp_path):
    def fails(error, said):
        with pytest.raises(error, match=said):
            printed("generate", tmp_path / "m", "-p", PROMPT, "--engine", "core")

    fails(FileNotFoundError, r"found no config\.json")
    shutil.copytree(model.parent / "float", tmp_path / "m")
    fails(ValueError, "expected a checkpoint that `qins quantize` wrote")
    shutil.rmtree(tmp_path / "m")
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    fails(ValueError, r"tokenizer\.json: expected a tokenizer")
    (tmp_path / "m" / "tokenizer.json").unlink()
    fails(FileNotFoundError, r"expected a tokenizer\.json")
