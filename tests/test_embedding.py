"""QINSEmbedding, and embeddings and output embeddings that are quantised on request."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

import qins
from qins.checkpoint import quantize_checkpoint

transformers = pytest.importorskip("transformers")
from test_hf import COMMON, close, make, outputs, same_state, with_decoded_weights  # noqa: E402

V5 = int(transformers.__version__.partition(".")[0]) >= 5

pytestmark = pytest.mark.once

CODECS = ("log8", "log9", "golden", "rational")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [1, 7, 64, 200])
def test_rows_are_the_decoded_ones(codec, dim):
    embedding = nn.Embedding(50, dim, padding_idx=3)
    coded = qins.QINSEmbedding.from_embedding(embedding, codec)
    decoded = torch.from_numpy(coded.encoded.decode())
    assert torch.equal(coded.weight, decoded)
    for ids in (
        torch.arange(50),
        torch.tensor([[7, 7], [49, 0]]),
        torch.tensor(4),
        torch.empty(0, 3, dtype=torch.long),
    ):
        assert torch.equal(coded(ids), nn.functional.embedding(ids, decoded))
    assert coded.padding_idx == 3
    assert isinstance(coded, nn.Embedding)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        coded(torch.tensor([50]))


def test_module():
    torch.manual_seed(0)
    embedding = nn.Embedding(40, 96)
    coded = qins.QINSEmbedding.from_embedding(embedding, group_size=32)
    assert repr(coded) == "QINSEmbedding(40, 96, codec=log8, group_size=32)"
    assert float((coded.weight - embedding.weight.detach()).norm() / coded.weight.norm()) < 0.01
    for other in (copy.deepcopy(coded), pickle.loads(pickle.dumps(coded))):
        assert torch.equal(other(torch.arange(9)), coded(torch.arange(9)))
    empty = qins.QINSEmbedding(40, 96, group_size=32)
    assert not empty(torch.arange(40)).any()
    empty.load_state_dict(coded.state_dict())
    assert torch.equal(empty.weight, coded.weight)
    half = copy.deepcopy(coded).bfloat16()
    assert torch.equal(half.scale, coded.scale)
    assert torch.equal(half(torch.arange(5)), coded.weight[:5].bfloat16())
    torch.library.opcheck(
        torch.ops.qins.embedding.default,
        (torch.arange(6).reshape(2, 3), [coded.get_buffer(n) for n in coded._names], "log8", 32, torch.float32),
    )
    with pytest.raises(AttributeError, match="weight of a QINSEmbedding is decoded"):
        coded.weight = embedding.weight
    with pytest.raises(RuntimeError, match=r"from_embedding"):
        empty.load_state_dict(embedding.state_dict())
    with pytest.raises(TypeError, match=r"source: expected an nn\.Embedding, got Linear"):
        qins.QINSEmbedding.from_embedding(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="max_norm"):
        qins.QINSEmbedding.from_embedding(nn.Embedding(3, 3, max_norm=1.0))


TIED = ("llama tied", "gpt2", "bert", "t5", "modernbert")


@pytest.mark.parametrize("name", ["llama", "phi3", *TIED])
@pytest.mark.parametrize("embeddings", [False, True])
def test_matrix(tmp_path, name, embeddings):
    model = make(name)
    cls = type(model)
    if name == "t5" and not V5:
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="needs transformers 5"):
            cls.from_pretrained(tmp_path, quantization_config=qins.QinsConfig(lm_head=True))
        return
    model.save_pretrained(tmp_path / "float")
    config = qins.QinsConfig(lm_head=True, embeddings=embeddings)
    quantised = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    source, output = quantised.get_input_embeddings(), quantised.get_output_embeddings()
    assert isinstance(output, qins.QINSLinear)
    assert isinstance(source, qins.QINSEmbedding) == embeddings
    if embeddings and name in TIED:  # one set of codes for both
        assert output.codes.data_ptr() == source.codes.data_ptr()
        assert not any(isinstance(m, nn.Linear) and type(m) is nn.Linear for m in quantised.modules())
    assert close(outputs(quantised), outputs(with_decoded_weights(model, quantised)))
    # two generations
    quantised.save_pretrained(tmp_path / "one")
    with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as f:
        stored = sum(f.get_slice(k).get_shape()[:2] in ([160, 64], [160, 64, 1]) for k in f.keys())  # noqa: SIM118
    assert stored == (1 if embeddings and name in TIED else 2)
    one = cls.from_pretrained(tmp_path / "one")
    assert same_state(one, quantised)
    assert close(outputs(one), outputs(quantised))
    one.save_pretrained(tmp_path / "two")
    two = qins.load(tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()
    assert close(outputs(two), outputs(quantised))
    if embeddings and name in TIED:
        assert two.get_output_embeddings().codes.data_ptr() == two.get_input_embeddings().codes.data_ptr()
    if two.can_generate():
        ids = torch.arange(3, 12)[None]
        kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(two.generate(ids, **kwargs), quantised.generate(ids, **kwargs))
    assert not qins.inspect(tmp_path / "one").problems
    assert not qins.memory_report(two).problems
    # casts and copies keep what is shared
    half = copy.deepcopy(two).bfloat16()
    if embeddings and name in TIED:
        assert half.get_output_embeddings().codes.data_ptr() == half.get_input_embeddings().codes.data_ptr()
    floats = copy.deepcopy(two).dequantize()
    assert not any(isinstance(m, (qins.QINSLinear, qins.QINSEmbedding)) for m in floats.modules())
    assert close(outputs(floats), outputs(two))


def test_an_untied_head_stays_as_it_is(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "float")
    quantised = type(model).from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig(embeddings=True))
    assert type(quantised.lm_head) is nn.Linear
    quantised.save_pretrained(tmp_path / "out")
    assert same_state(qins.load(tmp_path / "out"), quantised)
    base = transformers.LlamaModel.from_pretrained(tmp_path / "out")
    assert isinstance(base.embed_tokens, qins.QINSEmbedding)
    assert same_state(base, quantised.model)


def test_refusals(tmp_path):
    make("llama tied").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tied to them"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=qins.QinsConfig(embeddings=True))
    quantised = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=qins.QinsConfig(embeddings=True, lm_head=True)
    )
    quantised.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["modules"]["lm_head"] == ["log8", 128, "model.embed_tokens"]


@pytest.mark.parametrize("how", ["while loading", "on disk"])
def test_scaled_embeddings_are_refused(tmp_path, how):
    """Gemma's multiply what they look up; plain rows of codes in their place would be other outputs."""
    sizes = COMMON | {"num_key_value_heads": 2, "head_dim": 16}
    transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes)).save_pretrained(tmp_path / "float")
    config = qins.QinsConfig(lm_head=True, embeddings=True)
    with pytest.raises(ValueError, match="embed_tokens is a Gemma3TextScaledWordEmbedding"):
        if how == "on disk":
            quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
        else:
            transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert not (tmp_path / "out").exists()


def test_a_state_dict_without_files():
    model = make("llama")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=state, quantization_config=qins.QinsConfig()
    )
    assert loaded.config.quantization_config.source is None
    assert close(outputs(loaded), outputs(with_decoded_weights(model, loaded)))


def test_resizing_is_refused_or_real(tmp_path):
    make("llama").save_pretrained(tmp_path)
    load = transformers.LlamaForCausalLM.from_pretrained
    with pytest.raises(ValueError, match="keeps its 160 rows, got 170; resize the float model"):
        load(tmp_path, quantization_config=qins.QinsConfig(embeddings=True)).resize_token_embeddings(170)
    floats = load(tmp_path, quantization_config=qins.QinsConfig())
    floats.resize_token_embeddings(170)
    assert outputs(floats).shape[-1] == 170


@pytest.mark.parametrize("embeddings", [False, True])
def test_overrides_and_codecs(tmp_path, embeddings):
    make("llama tied").save_pretrained(tmp_path)
    config = qins.QinsConfig(
        lm_head=True, embeddings=embeddings, overrides={"*embed_tokens": {"codec": "golden"}}
    )  # fmt: skip
    quantised = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert quantised.lm_head.codec == "golden"
    quantised.save_pretrained(tmp_path / "out")
    again = qins.load(tmp_path / "out")
    assert same_state(again, quantised)
    assert close(outputs(again), outputs(quantised))
