"""Decoder against transformers: families, dtypes, caches; and that it needs neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn  # noqa: E402

import qins  # noqa: E402
from qins.decoder import Decoder  # noqa: E402
from qins.decoder.families import FAMILIES  # noqa: E402

pytestmark = pytest.mark.once  # tests/decoder has every instruction set
WINDOW = 8
SIZES = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attn_implementation": "eager", "initializer_range": 0.1,
}  # fmt: skip
ROPE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "llama": ("Llama", {"attention_bias": True}),
    "llama, scaled": ("Llama", {"rope_scaling": ROPE} if transformers.__version__ < "5" else {"rope_parameters": ROPE}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "smollm3": ("SmolLM3", {}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {
        "residual_multiplier": 0.5, "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "logits_scaling": 3.0,
    }),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}),
    "gemma3_text": ("Gemma3", {
        "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "sliding_window_pattern": 2,
    }),
}  # fmt: skip


def test_every_family_is_tried():
    assert {name.partition(",")[0] for name in MODELS} == set(FAMILIES)


def save(path, name, dtype=None, **config):
    """Write a tiny random model with codes; return what transformers loads from there."""
    kind, more = MODELS[name]
    torch.manual_seed(0)
    configured = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(configured).eval()
    for key, p in model.named_parameters():
        if "norm" in key:
            nn.init.normal_(p, 0.1 if "gemma" in name else 0.8, 0.2)
        elif key.endswith("bias"):
            nn.init.normal_(p, 0.0, 0.1)
    model.to(dtype or torch.float32).save_pretrained(path / "float")
    auto = transformers.AutoModelForCausalLM
    quantized = auto.from_pretrained(path / "float", dtype=dtype, quantization_config=qins.QinsConfig(**config))
    quantized.save_pretrained(path / "out")
    return auto.from_pretrained(path / "out", dtype=torch.float32, attn_implementation="eager").eval()


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def divergence(a, b):
    a, b = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (a, b))
    return float((a.exp() * (a - b)).sum(-1).max())


IDS = [(7 * i * i + 3 * i) % 157 + 3 for i in range(150)]


@pytest.mark.parametrize("name", MODELS)
def test_logits(tmp_path, name):
    model = save(tmp_path, name)
    decoder = Decoder.open(tmp_path / "out")
    expected = logits(model, IDS)
    got = decoder.logits(IDS[:130], every=True)  # more than one call of the core
    assert divergence(expected[:130], got) < 1e-7
    for i in range(130, 145):  # one by one
        assert divergence(expected[i], decoder.logits([IDS[i]])) < 1e-7
    assert divergence(expected[-1], decoder.logits(IDS[145:])) < 1e-7
    assert decoder.past == len(IDS)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"lm_head": True}),
        *((name, {"lm_head": True, "embeddings": True}) for name in ("llama", "llama, tied", "gemma", "granite")),
        ("llama, tied", {"lm_head": True, "embeddings": True, "codec": "log4"}),
    ],
    ids=str,
)
def test_heads_and_embeddings(tmp_path, name, config):
    expected = logits(save(tmp_path, name, **config), IDS)
    assert divergence(expected, Decoder.open(tmp_path / "out").logits(IDS, every=True)) < 1e-7


@pytest.mark.filterwarnings("ignore:.*rational:DeprecationWarning")
@pytest.mark.parametrize("codec", ["log8", "log9", "golden", "rational", "log6", "log5", "log4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codecs_and_dtypes(tmp_path, codec, dtype):
    expected = logits(save(tmp_path, "llama", dtype, codec=codec), IDS)
    assert divergence(expected, Decoder.open(tmp_path / "out").logits(IDS, every=True)) < 1e-7


def test_generate_and_caches(tmp_path):
    model = save(tmp_path, "llama")
    decoder = qins.Decoder.open(str(tmp_path / "out"))
    expected = model.generate(torch.tensor([IDS[:10]]), max_new_tokens=100, do_sample=False, eos_token_id=None)
    expected = expected[0, 10:].tolist()
    assert list(decoder.generate(IDS[:10], 100)) == expected
    assert decoder.past == 109  # the last token has not been run
    decoder.crop(10)
    assert list(decoder.generate(expected[:1], 5)) == expected[1:6]
    decoder.reset()
    stop = expected[3]
    assert list(decoder.generate(np.array(IDS[:10]), 100, stop=[stop])) == expected[: expected.index(stop) + 1]
    decoder.reset()
    sampled = [list(decoder.generate(IDS[:10], 20, temperature=1.0, top_k=20, top_p=0.9, seed=3))]
    decoder.reset()
    sampled.append(list(decoder.generate(IDS[:10], 20, temperature=1.0, top_k=20, top_p=0.9, seed=3)))
    assert sampled[0] == sampled[1] != expected[:20]
    decoder.reset()
    assert list(decoder.generate(IDS[:10], 20, temperature=1.0, top_k=1, seed=4)) == expected[:20]


def test_threads_change_nothing(tmp_path):
    save(tmp_path, "llama")
    found = []
    for n in (1, 2, 5):
        qins.set_num_threads(n)
        found.append(Decoder.open(tmp_path / "out").logits(IDS, every=True))
    assert all(np.array_equal(found[0], f) for f in found)


def test_without_torch(tmp_path):
    model = save(tmp_path, "llama")
    code = (
        "import json, sys, qins\n"
        "d = qins.Decoder.open(sys.argv[1])\n"
        "print(json.dumps(list(d.generate(json.loads(sys.argv[2]), 10))))\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules), sorted(sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), json.dumps(IDS)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    expected = model.generate(torch.tensor([IDS]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert json.loads(ran.stdout) == expected[0, len(IDS) :].tolist()
