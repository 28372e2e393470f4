"""Decoder with NumPy alone: a small Llama written by hand, against its formulas in float64; and wrong input."""

from __future__ import annotations

import json

import numpy as np
import pytest

import qins
from qins.decoder import Decoder
from qins.decoder.model import _sample
from qins.decoder.tensors import Tensors

numpy_files = pytest.importorskip("safetensors.numpy")

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY, LAYERS = 64, 96, 4, 2, 160, 4
DIM = HIDDEN // HEADS
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (HEADS * DIM, HIDDEN), "self_attn.k_proj": (KV_HEADS * DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * DIM),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
IDS = [(7 * i * i + 3 * i) % 157 + 3 for i in range(45)]


def write(path):
    """Write a checkpoint; return its dequantized weights in float64."""
    rng = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": rng.normal(0, 1, (VOCABULARY, HIDDEN)).astype(np.float32),
        "model.norm.weight": rng.normal(1, 0.2, HIDDEN).astype(np.float32),
        "lm_head.weight": rng.normal(0, 0.2, (VOCABULARY, HIDDEN)).astype(np.float16),
    }
    weights = {k: v.astype(np.float64) for k, v in tensors.items()}
    modules = {}
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = rng.normal(1, 0.2, HIDDEN).astype(np.float32)
            weights[f"{prefix}{name}.weight"] = tensors[f"{prefix}{name}.weight"].astype(np.float64)
        for name, shape in SHAPES.items():
            e = qins.encode(rng.normal(0, 0.2, shape).astype(np.float32), group_size=64)
            modules[prefix + name] = ["log8", 64]
            tensors |= {f"{prefix}{name}.{field}": value for field, value in e.fields.items()}
            weights[f"{prefix}{name}.weight"] = e.decode().astype(np.float64)
    path.mkdir(parents=True, exist_ok=True)
    numpy_files.save_file(tensors, path / "model.safetensors")
    config = CONFIG | {"quantization_config": {"quant_method": "qins", "modules": modules}}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return weights


def reference(w, ids):
    """Return the logits after each token."""

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]

    def turned(x):  # (tokens, heads, dim), by halves
        angle = np.arange(len(ids))[:, None] / 1e4 ** (np.arange(0, DIM, 2) / DIM)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][ids]
    seen = np.tril(np.ones((len(ids), len(ids)), bool))
    for i in range(LAYERS):
        layer = f"model.layers.{i}."

        def times(x, name, layer=layer):
            return x @ w[f"{layer}{name}.weight"].T

        n = norm(x, f"{layer}input_layernorm")
        q, k, v = (times(n, f"self_attn.{p}_proj").reshape(len(ids), -1, DIM) for p in "qkv")
        q, k, v = turned(q), turned(k).repeat(HEADS // KV_HEADS, 1), v.repeat(HEADS // KV_HEADS, 1)
        scores = np.where(seen, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(DIM), -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", weight / weight.sum(-1, keepdims=True), v)
        x = x + times(attended.reshape(len(ids), -1), "self_attn.o_proj")
        n = norm(x, f"{layer}post_attention_layernorm")
        gate = times(n, "mlp.gate_proj")
        x = x + times(gate / (1 + np.exp(-gate)) * times(n, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "model.norm") @ w["lm_head.weight"].T


def divergence(a, b):
    a, b = (x - x.max(-1, keepdims=True) for x in (a.astype(np.float64), b.astype(np.float64)))
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    return (np.exp(a) * (a - b)).sum(-1).max()


def test_against_the_formulas(isa, tmp_path):
    ids = (IDS * 4)[:150]
    expected = reference(write(tmp_path), ids)
    decoder = Decoder.open(tmp_path)
    got = decoder.logits(ids[:140], every=True)  # more than one call of the core
    assert divergence(expected[:140], got) < 1e-5  # products round activations to 13 bits and more
    for i in range(140, len(ids)):
        assert divergence(expected[i], decoder.logits([ids[i]])) < 1e-5


def test_a_cache_that_grows(tmp_path):
    write(tmp_path)
    decoder = Decoder.open(tmp_path)
    made = list(decoder.generate(IDS, 100))
    again = Decoder.open(tmp_path)
    assert list(again.generate([*IDS, *made[:60]], 40)) == made[60:]
    assert again.past == decoder.past == 144


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    write(path)
    return path


def test_rope_of_llama_3_without_its_original_length(tmp_path):
    """Which is 8,192 tokens then, as transformers has it."""
    found = []
    for length in ({}, {"original_max_position_embeddings": 8192}, {"original_max_position_embeddings": 64}):
        write(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text("utf-8"))
        config["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0} | length
        (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
        found.append(Decoder.open(tmp_path).logits(IDS))
    assert np.array_equal(found[0], found[1])
    assert not np.allclose(found[0], found[2])


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "expected a sequence of integers"),
        ([1.5], "expected a sequence of integers, got dtype float64"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([1, 160], "expected 0 to 159, got 160"),
        ([-1], "expected 0 to 159, got -1"),
    ],
)
def test_wrong_ids(saved, ids, said):
    decoder = Decoder.open(saved)
    decoder.logits([1, 2, 3])
    with pytest.raises(ValueError, match=said):
        decoder.logits(ids)
    assert decoder.past == 3


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 3}, [0.5, 0.3, 0.15]),
        ({"top_p": 0.6}, [0.5, 0.3]),
        ({"min_p": 0.29}, [0.5, 0.3, 0.15]),
        ({"top_p": 0.9, "min_p": 0.55}, [0.5, 0.3]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
    ],
    ids=str,
)
def test_sampling(saved, monkeypatch, options, probabilities):
    decoder = Decoder.open(saved)
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[[7, 3, 11, 5]] = np.log([0.5, 0.3, 0.15, 0.05])
    monkeypatch.setattr(decoder, "logits", lambda ids: logits)
    drawn = np.bincount(list(decoder.generate([1], 4000, seed=0, **{"temperature": 1.0} | options)), minlength=12)
    expected = np.array(probabilities) / sum(probabilities)
    assert drawn.sum() == drawn[[7, 3, 11, 5][: len(expected)]].sum()
    np.testing.assert_allclose(drawn[[7, 3, 11, 5][: len(expected)]] / 4000, expected, atol=0.03)


def test_wrong_arguments(saved):
    decoder = Decoder.open(saved)
    wrong = [("temperature", -1.0), ("temperature", float("nan")), ("top_k", 0), ("top_p", 1.1), ("min_p", -1.0)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"expected .*{name}|{name}: expected 0 to 1"):
            decoder.generate([1], **{name: value})
    with pytest.raises(ValueError, match="tokens: expected 0 to 0, got 1"):
        decoder.crop(1)


def changed(saved, path, **changes):
    path = path / "changed"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((saved / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | changes), "utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, "model_type: expected one of llama, .*, got 'bert'"),
        ({"model_type": ["llama"]}, "model_type: expected one of"),
        ({"hidden_size": 32}, r"expected codes of shape|expected shape"),
        ({"hidden_size": "64"}, "hidden_size: expected a positive integer, got '64'"),
        ({"num_hidden_layers": 5}, "layers.4.*expected codes"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 1024}, "head_dim: expected at most 512, got 1024"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor: expected an even part of 16, got 32"),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layer_types: .* got 'linear_attention'"),
        ({"layer_types": ["full_attention"] * 3 + [[]]}, "layer_types: expected full_attention or"),
        ({"hidden_act": "relu"}, "activation: expected one of silu, gelu_pytorch_tanh, got 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: expected default, linear or llama3, got 'yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters: expected an object"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected one entry for each of 4 layers"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers: expected at most 65536"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a positive number"),
        ({"query_pre_attn_scalar": -2.0}, "query_pre_attn_scalar: expected a positive number"),
        ({"logits_scaling": 0.0}, "logits_scaling: expected a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a finite number"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta: expected a positive number"),
        ({"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 4.0}}, "high_freq_factor: expected another"),
        ({"hidden_act": ["silu"]}, "activation: expected one of"),
        ({"quantization_config": None}, "expected a checkpoint that `qins quantize` wrote"),
        ({"quantization_config": {"quant_method": "qins", "modules": {}}}, "expected codes"),
    ],
    ids=str,
)
def test_wrong_configs(saved, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        Decoder.open(changed(saved, tmp_path, **changes))


def test_damaged_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no config\.json"):
        Decoder.open(tmp_path / "nope")
    path = changed(saved, tmp_path)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for some in (
        b"",
        whole[:5],
        whole[:100],
        whole[: len(whole) // 2],
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"[" + whole[9:],
    ):
        file.write_bytes(some)
        with pytest.raises(ValueError, match=r"model\.safetensors|expected a tensor"):
            Decoder.open(path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="expected safetensors files"):
        Decoder.open(path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (["nope", 64], "codec: expected one of"),
        (["log8", "64"], "group_size: expected a positive integer"),
        (["log8", 2**62], "group_size: expected at most"),
        (["golden", 64], "group_size: expected None"),
    ],
)
def test_hostile_modules(saved, tmp_path, entry, said):
    path = changed(saved, tmp_path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    config["quantization_config"]["modules"] = dict.fromkeys(config["quantization_config"]["modules"], entry)
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=f"modules: .*: {said}"):
        Decoder.open(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"a":' * 100_000, "expected a safetensors header of JSON"),
        (b'{"a":{"dtype":"U8","shape":[1e400],"data_offsets":[0,0]}}', "expected dtype, shape and offsets"),
        (b'{"a":{"dtype":"U8","shape":[0,%d],"data_offsets":[0,0]}}' % 2**70, "does not fit"),
        (b'{"a":{"dtype":"U8","shape":[0%s],"data_offsets":[0,0]}}' % (b",1" * 70), "does not fit"),
        (b'{"a":{"dtype":["U8"],"shape":[0],"data_offsets":[0,0]}}', "expected dtype, shape and offsets"),
    ],
    ids=["nested", "infinite", "large", "dimensions", "dtype"],
)
def test_hostile_headers(saved, tmp_path, header, said):
    path = changed(saved, tmp_path)
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=said):
        Decoder.open(path)


def test_several_files(saved, tmp_path):
    path = changed(saved, tmp_path)
    tensors = numpy_files.load_file(path / "model.safetensors")
    expected = Decoder.open(path).logits(IDS)
    halves = {f"model-{i}.safetensors": {k: tensors[k] for k in sorted(tensors)[i::2]} for i in (0, 1)}
    (path / "model.safetensors").unlink()
    for name, part in halves.items():
        numpy_files.save_file(part, path / name)
    with pytest.raises(ValueError, match="expected one model, got 2 files and no index"):
        Decoder.open(path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: name for name, part in halves.items() for k in part}}))
    (path / "other.safetensors").write_bytes(b"none of the index's")
    assert np.array_equal(Decoder.open(path).logits(IDS), expected)
    index.write_text(json.dumps({"weight_map": {"a": "../model-0.safetensors"}}))
    with pytest.raises(ValueError, match="expected a weight_map"):
        Decoder.open(path)
    index.write_text(json.dumps({"weight_map": {"a": "nope.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"nope\.safetensors"):
        Decoder.open(path)
    numpy_files.save_file(tensors, path / "model-0.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match="is also in another file"):
        Decoder.open(path)


def test_nan_gives_nan(saved, tmp_path):
    """As the modules do: never an error, never memory."""
    decoder = Decoder.open(changed(saved, tmp_path))
    decoder._table = decoder._table.copy()
    decoder._table[IDS[0]] = np.nan
    assert np.isnan(decoder.logits(IDS)).all()


def test_nan_is_sampled_from():
    """From logits that are NaN some token comes, and no error, as in greedy decoding."""
    for limits in ((None, None, None), (2, 0.5, None), (None, None, 0.1)):
        assert 0 <= _sample(np.full(5, np.nan, np.float32), *limits, np.random.default_rng(0)) < 5


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    numpy_files.save_file({"a": np.ones((2, 3), np.float32)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "qins", "modules": {}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = Tensors(tmp_path)
    assert tensors.floats("a").shape == tensors.floats("a", (2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"a: expected shape \(3, 2\), got \(2, 3\)"):
        tensors.floats("a", (3, 2))
