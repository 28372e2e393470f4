"""QINSEmbedding, and embeddings and output embeddings that are quantized on request."""

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
from tiny import COMMON, close, make, outputs, same_state, with_decoded_weights  # noqa: E402

V5 = int(transformers.__version__.partition(".")[0]) >= 5

pytestmark = pytest.mark.once

CODECS = [
    *((codec, dim) for codec in ("log8", "log9", "golden", "rational") for dim in (1, 7, 64, 200)),
    *((codec, dim) for codec in ("log6", "log5", "log4") for dim in (8, 64, 200)),
]


@pytest.mark.parametrize(("codec", "dim"), CODECS)
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
    for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):  # that others may read
        assert getattr(empty, name) == getattr(embedding, name)
    empty.load_state_dict(coded.state_dict())
    assert torch.equal(empty.weight, coded.weight)
    assert coded.to_float().weight.dtype is torch.float32
    assert coded.to_float(torch.float64).weight.dtype is torch.float64
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
    quantized = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    source, output = quantized.get_input_embeddings(), quantized.get_output_embeddings()
    assert isinstance(output, qins.QINSLinear)
    assert isinstance(source, qins.QINSEmbedding) == embeddings
    if embeddings and name in TIED:  # one set of codes for both
        assert output.codes.data_ptr() == source.codes.data_ptr()
        assert not any(isinstance(m, nn.Linear) and type(m) is nn.Linear for m in quantized.modules())
    assert close(outputs(quantized), outputs(with_decoded_weights(model, quantized)))
    # two generations
    quantized.save_pretrained(tmp_path / "one")
    with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as f:
        stored = sum(f.get_slice(k).get_shape()[:2] in ([160, 64], [160, 64, 1]) for k in f.keys())  # noqa: SIM118
    assert stored == (1 if embeddings and name in TIED else 2)
    one = cls.from_pretrained(tmp_path / "one")
    assert same_state(one, quantized)
    assert close(outputs(one), outputs(quantized))
    one.save_pretrained(tmp_path / "two")
    two = qins.load(tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()
    assert close(outputs(two), outputs(quantized))
    if embeddings and name in TIED:
        assert two.get_output_embeddings().codes.data_ptr() == two.get_input_embeddings().codes.data_ptr()
    if two.can_generate():
        ids = torch.arange(3, 12)[None]
        kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(two.generate(ids, **kwargs), quantized.generate(ids, **kwargs))
    assert not qins.inspect(tmp_path / "one").problems
    assert not qins.memory_report(two).problems
    # casts and copies keep shared codes shared
    half = copy.deepcopy(two).bfloat16()
    if embeddings and name in TIED:
        assert half.get_output_embeddings().codes.data_ptr() == half.get_input_embeddings().codes.data_ptr()
    floats = copy.deepcopy(two).dequantize()
    assert not any(isinstance(m, (qins.QINSLinear, qins.QINSEmbedding)) for m in floats.modules())
    assert close(outputs(floats), outputs(two))


def test_an_untied_head_stays_as_it_is(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "float")
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig(embeddings=True))
    assert type(quantized.lm_head) is nn.Linear
    quantized.save_pretrained(tmp_path / "out")
    assert same_state(qins.load(tmp_path / "out"), quantized)
    base = transformers.LlamaModel.from_pretrained(tmp_path / "out")
    assert isinstance(base.embed_tokens, qins.QINSEmbedding)
    assert same_state(base, quantized.model)


def test_refusals(tmp_path):
    make("llama tied").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tied to them"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=qins.QinsConfig(embeddings=True))
    quantized = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=qins.QinsConfig(embeddings=True, lm_head=True)
    )
    quantized.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["modules"]["lm_head"] == ["log8", 64, "model.embed_tokens"]


def gemma3(dtype=torch.float32):
    sizes = COMMON | {"num_key_value_heads": 2, "head_dim": 16, "hidden_size": 96}
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM._from_config(transformers.Gemma3TextConfig(**sizes), dtype=dtype).eval()


def bart():
    sizes = {"vocab_size": 160, "d_model": 48, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, scale_embedding=True)).eval()


SCALED = {"gemma3": gemma3, "gemma3 bfloat16": lambda: gemma3(torch.bfloat16)} | ({"bart": bart} if V5 else {})


def same_outputs(quantized, original):
    decoded = with_decoded_weights(original, quantized)
    ids = torch.arange(160).reshape(4, 40)
    with torch.no_grad():
        assert torch.equal(quantized.get_input_embeddings()(ids), decoded.get_input_embeddings()(ids))
    difference = (outputs(quantized) - outputs(decoded)).norm() / outputs(decoded).norm()
    assert float(difference) < (2e-3 if decoded.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("how", ["in place", "while loading", "on disk"])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_embeddings(tmp_path, name, how):
    """Gemma's and Bart's embeddings scale their rows; Gemma's round the factor to the weight's dtype first."""
    model = SCALED[name]()
    cls, dtype = type(model), model.dtype
    model.save_pretrained(tmp_path / "float")
    config = qins.QinsConfig(lm_head=True, embeddings=True)
    if how == "in place":
        quantized = copy.deepcopy(model)
        report = qins.convert(quantized, exclude=(), embeddings=True)
        assert not [s for s in report.skipped if "shares" not in s.reason]
    elif how == "while loading":
        quantized = cls.from_pretrained(tmp_path / "float", quantization_config=config, dtype=dtype)
    else:
        quantize_checkpoint(tmp_path / "float", tmp_path / "codes", config)
        quantized = cls.from_pretrained(tmp_path / "codes", dtype=dtype)
    source = quantized.get_input_embeddings()
    assert isinstance(source, qins.QINSEmbedding)
    assert quantized.get_output_embeddings().codes.data_ptr() == source.codes.data_ptr()
    assert not [n for n, m in quantized.named_modules() if type(m) is nn.Linear]
    same_outputs(quantized, model)
    # two generations
    quantized.save_pretrained(tmp_path / "one")
    one = cls.from_pretrained(tmp_path / "one", dtype=dtype)
    one.save_pretrained(tmp_path / "two")
    two = qins.load(tmp_path / "two", dtype=dtype)
    for again in (one, two, copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        assert same_state(again, quantized)
        assert torch.equal(outputs(again), outputs(quantized))
        assert again.get_output_embeddings().codes.data_ptr() == again.get_input_embeddings().codes.data_ptr()
    ids = torch.arange(3, 12)[None]
    kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(two.generate(ids, **kwargs), quantized.generate(ids, **kwargs))
    files = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("float", "one")]
    assert files[1] < files[0] * (0.45 if dtype == torch.float32 else 0.7)
    assert not qins.inspect(tmp_path / "one").problems
    # other dtypes, and back to floats
    for other in (torch.bfloat16, torch.float32):
        if how == "in place" and dtype == torch.float32:
            same_outputs(copy.deepcopy(two).to(other), copy.deepcopy(model).to(other))
    floats = copy.deepcopy(two).dequantize()
    ids = torch.arange(160)
    assert not any(isinstance(m, (qins.QINSLinear, qins.QINSEmbedding)) for m in floats.modules())
    assert torch.equal(floats.get_input_embeddings()(ids), source(ids))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 1.7


class Moved(Scaled):
    def __init__(self, *sizes, **kwargs):
        super().__init__(*sizes, **kwargs)
        self.bias = nn.Parameter(torch.randn(sizes[1]))

    def forward(self, ids):
        return super().forward(ids) + self.bias


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.layer_norm(super().forward(ids), (self.embedding_dim,))


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward((ids + 2) % self.num_embeddings)


class Padded(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * (ids != self.padding_idx).unsqueeze(-1)


class Dropped(nn.Embedding):
    def forward(self, ids):
        return nn.functional.dropout(super().forward(ids), 0.5, self.training)


class Decoupled(nn.Embedding):
    def __init__(self, *sizes, **kwargs):
        super().__init__(*sizes, **kwargs)
        self.more = nn.Embedding(2, sizes[1])


class Positions(nn.Embedding):
    def forward(self, ids, past):
        return super().forward(ids + past)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Scaled, Moved])
def test_subclasses_with_a_factor_or_a_bias(kind, dtype):
    torch.manual_seed(0)
    source = kind(300, 64, padding_idx=7).to(dtype)
    coded = qins.QINSEmbedding.from_embedding(source)
    with torch.no_grad():
        source.weight.copy_(coded.weight)
        ids = torch.arange(300).reshape(3, 100)
        assert torch.equal(coded(ids), source(ids))
        assert torch.equal(coded.to_float()(ids), source(ids))
    assert ("bias" in coded.state_dict()) == (kind is Moved)
    assert "factor=1.7" in repr(coded)
    assert coded.training


@pytest.mark.parametrize("kind", [Normed, Shifted, Padded, Dropped, Decoupled, Positions])
def test_subclasses_that_compute_something_else_are_refused(kind):
    source = kind(50, 16, padding_idx=3)
    before = copy.deepcopy(source.state_dict())
    sentence = f"a {kind.__name__}, which may compute something other than rows times a factor: (it|its) "
    with pytest.raises(ValueError, match=sentence):
        qins.QINSEmbedding.from_embedding(source)
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
    model = nn.Sequential(source, nn.Linear(16, 16))
    report = qins.convert(model, embeddings=True)
    assert [s.name for s in report.skipped] == ["0"]
    assert model[0] is source


@pytest.mark.parametrize("how", ["while loading", "on disk", "of codes"])
def test_what_is_refused_of_models(tmp_path, how, monkeypatch):
    model = gemma3()
    kind = type(model.get_input_embeddings())
    model.save_pretrained(tmp_path / "float")
    config = qins.QinsConfig(lm_head=True, embeddings=True)
    if how == "of codes":
        quantize_checkpoint(tmp_path / "float", tmp_path / "codes", config)
    monkeypatch.setattr(kind, "forward", Normed.forward)
    with pytest.raises(ValueError, match=r"embed_tokens.* a Gemma3TextScaledWordEmbedding, which may compute"):
        if how == "on disk":
            quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
        elif how == "while loading":
            transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
        else:
            transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "codes")
    assert not (tmp_path / "out").exists()


def test_embeddings_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 40, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="embeddings: 1 shares the weight of 0, and would keep the floats"):
        qins.convert(model, exclude="1", embeddings=True)
    assert type(model[0]) is nn.Embedding
    report = qins.convert(model, embeddings=True)
    assert [m.name for m in report.converted] == ["0"]
    assert model[0].codes is model[1].codes
    left = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 40))
    qins.convert(left)
    assert type(left[0]) is nn.Embedding


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
@pytest.mark.parametrize("codec", ["golden", "log4"])
def test_overrides_and_codecs(tmp_path, embeddings, codec):
    make("llama tied").save_pretrained(tmp_path)
    config = qins.QinsConfig(
        lm_head=True, embeddings=embeddings, overrides={"*embed_tokens": {"codec": codec}}
    )  # fmt: skip
    quantized = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert quantized.lm_head.codec == codec
    quantized.save_pretrained(tmp_path / "out")
    again = qins.load(tmp_path / "out")
    assert same_state(again, quantized)
    assert close(outputs(again), outputs(quantized))
