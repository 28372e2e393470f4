"""Every command on every kind of model and file, and with every option at the edges of its values.

A command succeeds, or it says in one line what is wrong; an exception that `cli.main` does not turn into such a line
ends the test.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import typing
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("uvicorn")
import torch
import typer
import typer.models
import uvicorn
from kinds import MAKERS
from terminal import as_shell
from tokens import save_tokenizer

from qins.cli.app import app

pytestmark = [
    pytest.mark.once,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:group_size"),
    pytest.mark.filterwarnings("ignore:.*requests run one after another"),
]

TEXT = " ".join(f"w{(7 * i * i + i) % 150}" for i in range(4000))


def break_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(change(config)), "utf-8")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# changes of a directory with a small Llama
FAULTS = {
    "config is a list": lambda d: break_config(d, lambda c: [c]),
    "no architecture": lambda d: break_config(d, lambda c: {k: v for k, v in c.items() if k != "architectures"}),
    "unknown architecture": lambda d: break_config(d, lambda c: c | {"architectures": ["NopeForCausalLM"]}),
    "unknown model": lambda d: break_config(d, lambda c: c | {"model_type": "nope"}),
    "no model type": lambda d: break_config(d, lambda c: {k: v for k, v in c.items() if k != "model_type"}),
    "negative width": lambda d: break_config(d, lambda c: c | {"hidden_size": -32}),
    "text for a width": lambda d: break_config(d, lambda c: c | {"hidden_size": "32"}),
    "other width": lambda d: break_config(d, lambda c: c | {"hidden_size": 64}),
    "no layers": lambda d: break_config(d, lambda c: c | {"num_hidden_layers": 0}),
    "other quantization": lambda d: break_config(d, lambda c: c | {"quantization_config": {"quant_method": "nope"}}),
    "codes that are not there": lambda d: break_config(
        d, lambda c: c | {"quantization_config": {"quant_method": "qins", "modules": {"a": ["log8", 64]}}}
    ),
    "config is empty": lambda d: (d / "config.json").write_text(""),
    "no config": lambda d: (d / "config.json").unlink(),
    "no tokenizer": lambda d: [p.unlink() for p in d.glob("*token*")],
    "tokenizer is empty": lambda d: [p.write_text("{}") for p in d.glob("*token*")],
    "half of the weights": lambda d: cut(d / "model.safetensors"),
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "weights are empty": lambda d: (d / "model.safetensors").write_bytes(b""),
    "nothing": lambda d: [p.unlink() for p in d.iterdir()],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with a model of each kind, and faulty ones."""
    root = tmp_path_factory.mktemp("models")
    for kind, make in MAKERS.items():
        torch.manual_seed(0)
        make().save_pretrained(root / kind)
        save_tokenizer(root / kind)
    for fault, change in FAULTS.items():
        shutil.copytree(root / "llama", root / fault)
        change(root / fault)
    (root / "text").write_text(TEXT)
    (root / "empty").write_text("")
    return root


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line as a shell does; check that it succeeds or says what is wrong, and return its exit code."""

    async def leave(server, counter):
        return True

    monkeypatch.setattr(uvicorn.Server, "on_tick", leave)  # a server that has started ends

    def run(*args):
        monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\n"))
        code, _, err = as_shell(monkeypatch, capfd, *args)
        assert "Traceback" not in err
        if code:
            assert code in (1, 2), args
            said = [li for li in err.splitlines() if li.startswith("error: ") or "Error" in li or " is above " in li]
            assert said, f"{args} failed without saying why: {err}"
            assert not said[-1].endswith(("error: ", "error: None")), err
        return code

    return run


def commands(model, out, root):
    """Return command lines for a model: those for the model, then those for its codes in `out`."""
    short = ["--tokens", "3"]
    text, window = ["--text", root / "text", "--tokens", "96"], []
    return [
        ["inspect", model],
        ["eval", model, *text, *window],
        ["generate", model, "-p", "w1 w2", *short],
        ["chat", model, *short],
        ["quantize", model, out],
        ["quantize", model, f"{out}-all", "--lm-head", "--embeddings"],
        ["quantize", model, f"{out}-few", "--codec", "log4", "--lm-head", "--embeddings"],
        ["quantize", model, f"{out}-calibrated", "--calibrate", root / "text", "--calibration-tokens", "512"],
        ["quantize", model, f"{out}-exact", "--exact"],
    ], [
        ["inspect", out],
        ["inspect", out, "--against", model, "--histogram", f"{out}.png"],
        ["inspect", f"{out}-few", "--against", model, "--histogram"],
        ["eval", out, "--against", model, *text],
        ["generate", out, "-p", "w1 w2", *short],
        ["chat", out, *short],
        ["serve", out, "--port", "0"],
        ["restore", out, f"{out}-restored"],
    ]


@pytest.mark.parametrize("kind", [*MAKERS, *FAULTS])
def test_every_command(run, root, tmp_path, kind):
    first, then = commands(root / kind, tmp_path / "out", root)
    codes = [run(*c) for c in first]
    if kind in MAKERS:
        assert codes[0] == 0
    if codes[4] == 0:
        for c in then:
            run(*c)


EDGES = {
    int: ["-1", "0", "1", "3", "x"],
    float: ["-1", "0", "0.5", "nan", "inf", "x"],
    Path: ["text/nope", ".", "empty", "text"],
    str: ["", "nope", "[", "log8"],
}


def options():
    """Return each option of each command that takes a value, with the type of its values."""
    found = []
    for registered in app.registered_commands:
        for name, annotation in typing.get_type_hints(registered.callback, include_extras=True).items():
            options = [o for o in getattr(annotation, "__metadata__", ()) if isinstance(o, typer.models.OptionInfo)]
            types = str(typing.get_type_hints(registered.callback)[name]) if options else ""
            kind = next((k for k in (int, float, Path, str) if k.__name__ in types), None)
            if options and kind is not None:
                declared = [o for o in options[0].param_decls or () if o.startswith("--")]
                option = declared[0] if declared else f"--{name.replace('_', '-')}"
                kind = Path if option in ("--model", "--against") else kind  # no name on the hub
                found.append((registered.name or registered.callback.__name__, option, kind))
    return found


BASE = {
    "demo": ["--model", "llama", "--tokens", "64"],
    "bench": ["--shape", "16x64", "--rows", "1", "--seconds", "0.01"],
    "inspect": ["llama"],
    "quantize": ["llama", "OUT"],
    "eval": ["OUT", "--against", "llama", "--text", "text", "--tokens", "64"],
    "generate": ["llama", "-p", "w1 w2", "--tokens", "2"],
    "chat": ["llama", "--tokens", "2"],
    "serve": ["llama", "--port", "0"],
    "restore": ["llama", "OUT"],
}


@pytest.mark.parametrize(("command", "option", "kind"), options(), ids=lambda v: getattr(v, "__name__", v))
def test_every_option(run, root, tmp_path, monkeypatch, command, option, kind):
    monkeypatch.chdir(root)
    assert set(BASE) == {registered.name or registered.callback.__name__ for registered in app.registered_commands}
    for i, value in enumerate(EDGES[kind]):
        out = tmp_path / str(i)
        base = [str(out) if a == "OUT" else a for a in BASE[command]]
        if command == "eval":
            assert run("quantize", "llama", out) == 0
        if option in base:  # once more, with this value
            at = base.index(option)
            del base[at : at + 2]
        run(command, *base, option, value)
