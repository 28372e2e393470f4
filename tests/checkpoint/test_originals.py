"""QinsConfig(exact=True): what save_pretrained writes restores the checkpoint that was loaded, bit for bit."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import qins
from qins.checkpoint import quantize_checkpoint
from qins.files import exact_bytes, open_checkpoint, restore_checkpoint

transformers = pytest.importorskip("transformers")
from originals import save, tree, whole_tensors  # noqa: E402
from tiny import make, outputs  # noqa: E402
from tiny_experts import MODELS as MOE  # noqa: E402
from tiny_experts import make as moe  # noqa: E402
from tokens import save_tokenizer  # noqa: E402

pytestmark = pytest.mark.once


def load(cls, path, dtype="auto", **options):
    return cls.from_pretrained(path, dtype=dtype, quantization_config=qins.QinsConfig(exact=True, **options))


def check_restored(tmp_path, out="out", back="back"):
    told = restore_checkpoint(tmp_path / out, tmp_path / back)
    assert told["changed"] == []
    assert tree(tmp_path / back) == tree(tmp_path / "float")


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "bert", "phi3"])
@pytest.mark.parametrize("options", [{}, {"lm_head": True, "embeddings": True, "codec": "log4"}], ids=str)
def test_architectures(tmp_path, name, options):
    cls = type(save(make(name), tmp_path / "float"))
    model = load(cls, tmp_path / "float", **options)
    model.save_pretrained(tmp_path / "out")
    check_restored(tmp_path)
    assert whole_tensors(tmp_path / "out") == []
    # the residuals are as small as those of the conversion on disk
    quantize_checkpoint(tmp_path / "float", tmp_path / "disk", qins.QinsConfig(**options), exact=True)
    sizes = [
        {k: t.bytes for f in (tmp_path / d).glob("exact-*") for k, t in open_checkpoint(f).tensors.items()}
        for d in ("out", "disk")
    ]
    assert sizes[0] == sizes[1]
    # a checkpoint of codes like any other, which does not ask for exact files when it is saved again
    again = qins.load(tmp_path / "out")
    assert torch.equal(outputs(again), outputs(model))
    again.save_pretrained(tmp_path / "again")
    assert exact_bytes(tmp_path / "again") == 0


@pytest.mark.parametrize("name", MOE)
def test_experts(tmp_path, name):
    cls = type(save(moe(name), tmp_path / "float"))
    load(cls, tmp_path / "float").save_pretrained(tmp_path / "out")
    check_restored(tmp_path)
    assert whole_tensors(tmp_path / "out") == []


def test_several_files(tmp_path):
    """The original has several files, and the codes are split elsewhere; files of another original are removed."""
    cls = type(save(make("llama"), tmp_path / "float", max_shard_size="40KB"))
    model = load(cls, tmp_path / "float")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "exact-other.safetensors").write_bytes(b"old")
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-0*"))) > len(list((tmp_path / "float").glob("model-0*"))) > 1
    check_restored(tmp_path)


def test_what_changed_since_loading(tmp_path):
    """Trained norms and another dtype are stored whole; codes that were changed only make residuals larger."""
    cls = type(save(make("llama"), tmp_path / "float"))
    model = load(cls, tmp_path / "float")
    with torch.no_grad():
        model.model.norm.weight += 1
    mlp = model.model.layers[0].mlp
    mlp.up_proj = qins.QINSLinear.from_linear(torch.nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, False))
    copied = copy.deepcopy(model)
    assert copied.save_pretrained.__self__ is copied
    copied.save_pretrained(tmp_path / "out")
    check_restored(tmp_path)
    assert whole_tensors(tmp_path / "out") == ["model.norm.weight"]
    load(cls, tmp_path / "float", dtype=torch.float32).save_pretrained(tmp_path / "wide")
    check_restored(tmp_path, "wide", "back-wide")
    assert "model.embed_tokens.weight" in whole_tensors(tmp_path / "wide")


def test_without_its_head(tmp_path):
    """A base model is saved under other names than its checkpoint has."""
    save(make("llama"), tmp_path / "float")
    load(transformers.LlamaModel, tmp_path / "float").save_pretrained(tmp_path / "out")
    check_restored(tmp_path)
    assert whole_tensors(tmp_path / "out") == ["lm_head.weight"]


def test_files_beside_the_weights(tmp_path):
    cls = type(save(make("llama"), tmp_path / "float"))
    (tmp_path / "float" / "notes.txt").write_text("kept")
    load(cls, tmp_path / "float").save_pretrained(tmp_path / "out")
    save_tokenizer(tmp_path / "out")  # later, as usual
    check_restored(tmp_path)


@pytest.mark.parametrize("within", [False, True])
def test_upload(tmp_path, monkeypatch, within):
    """Files that are uploaded include those that restore the original, whichever call uploads them."""
    uploaded = []

    def upload(self, working_dir, *args, **kwargs):
        uploaded.extend(p.name for p in Path(working_dir).iterdir())

    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    cls = type(save(make("llama"), tmp_path / "float"))
    model = load(cls, tmp_path / "float")
    repo = type("Repo", (), {"repo_id": "name/model"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: repo)
    for module in ("transformers.modeling_utils", "transformers.utils.hub"):  # which would ask the hub for a card
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", mock.MagicMock())
    if within:
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    else:
        model.push_to_hub("name/model")
    assert {"model.safetensors", "exact-model.safetensors", "README.md"} <= {*uploaded}


def test_dequantized(tmp_path):
    """A model that is no longer quantized is saved as it is."""
    cls = type(save(make("llama"), tmp_path / "float"))
    load(cls, tmp_path / "float").dequantize().save_pretrained(tmp_path / "out")
    assert exact_bytes(tmp_path / "out") == 0


def test_refusals(tmp_path):
    cls = type(save(make("llama"), tmp_path / "float"))
    load(cls, tmp_path / "float").save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="exact: expected a model that is loaded from files of floats, got codes"):
        load(cls, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="exact: expected a model that is loaded from files of floats, got none"):
        cls.from_pretrained(
            None, config=config, state_dict=make("llama").state_dict(), quantization_config=qins.QinsConfig(exact=True)
        )
    model = load(cls, tmp_path / "float")
    before = tree(tmp_path / "float")
    with pytest.raises(ValueError, match="holds the original, which saving codes would overwrite"):
        model.save_pretrained(tmp_path / "float")
    assert tree(tmp_path / "float") == before
    shutil.rmtree(tmp_path / "float")
    with pytest.raises(FileNotFoundError, match="float"):
        model.save_pretrained(tmp_path / "late")
    save(make("llama"), tmp_path / "wide", torch.float32)
    with pytest.raises(ValueError, match="exact restoring expects bfloat16 or float16, got float32"):
        load(cls, tmp_path / "wide")


def test_values(tmp_path):
    """The codes are those without `exact`."""
    cls = type(save(make("llama"), tmp_path / "float"))
    load(cls, tmp_path / "float").save_pretrained(tmp_path / "out")
    cls.from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig()).save_pretrained(tmp_path / "plain")
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()
