"""Checkpoints of codes served by vLLM's CPU back end, against transformers with the same codes.

`make test-vllm` runs these in an environment of their own; in others, vLLM is missing.
"""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import transformers
from torch import nn

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
pytest.importorskip("vllm.config", reason="NOT RUN: vLLM is not installed; `make test-vllm` installs it")

from safetensors.torch import load_file, save_file

from qins.checkpoint import quantize_checkpoint
from qins.hf import QinsConfig, find_model

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("default")]

PROMPTS = [[1, 2, 3, 4, 5], [9], [7, 60, 33, 8, 100, 90, 80, 70, 60, 50, 40]]
# vLLM pads a vocabulary to a multiple of 64. Weights this large make tokens that differ from step to step.
SIZES = {"vocab_size": 250, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}  # fmt: skip
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "llama tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "phi3": (transformers.Phi3Config, {"original_max_position_embeddings": 128}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig, {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    ),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
         "shared_expert_intermediate_size": 96},
    ),
}  # fmt: skip


def floats(name, directory, dtype=torch.float32):
    """Save a tiny random model."""
    kind, more = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**(SIZES | more)), dtype=torch.float32).eval()
    for key, p in model.named_parameters():  # some biases start at zero, which would hide a lost one
        if key.endswith("bias"):
            nn.init.normal_(p, std=0.5)
    model.to(dtype).save_pretrained(directory)
    return directory


def codes(name, directory, **settings):
    """Save the codes of a tiny random model."""
    return encoded(floats(name, directory / "floats"), directory / "codes", **settings)


def encoded(source, directory, **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=QinsConfig(**settings), dtype=torch.float32
    )
    model.save_pretrained(directory)
    return directory


def serve(directory, prompts=PROMPTS, tokens=16, **options):
    """Return the tokens that vLLM generates, of each prompt."""
    from vllm import LLM, SamplingParams

    settings = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128}
    llm = LLM(model=str(directory), max_num_seqs=4, **(settings | options))
    try:
        greedy = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return [list(o.outputs[0].token_ids) for o in outputs]


def check_greedy(directory, served, prompts=PROMPTS, tie=1e-3):
    """Check that each token has the largest logit according to transformers, or one within `tie` of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    others = 0
    for prompt, tokens in zip(prompts, served, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        best, chosen = logits.max(1), logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((best.values - chosen).max()) <= tie
        others += int((best.indices != torch.tensor(tokens)).sum())
    assert others <= 1  # ties are rare
    assert len({t for tokens in served for t in tokens}) > 8  # a model that repeats one token shows nothing
    return model


CODECS = {"q_proj": "log6", "o_proj": "log9", "gate_proj": "golden", "down_proj": "rational"}
MIXED = {f"*.{name}": {"codec": codec} for name, codec in CODECS.items()}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"codec": "log8", "group_size": None, "lm_head": True, "embeddings": True}),
        ("llama tied", {"codec": "golden", "lm_head": True, "embeddings": True}),
        ("llama tied", {"codec": "log8", "lm_head": True}),
        ("qwen2", {"codec": "log5", "overrides": MIXED, "exclude": ["*.1.self_attn.v_proj", "*.up_proj"]}),
        ("qwen3", {"codec": "log4", "lm_head": True, "embeddings": True}),
        ("phi3", {"codec": "log6"}),
        ("qwen3_moe", {}),
        ("qwen2_moe", {"codec": "log6"}),
    ],
    ids=[
        "log8",
        "embeddings",
        "shared",
        "own head",
        "mixed",
        "log4",
        "joined in the file",
        "experts",
        "shared experts",
    ],
)
def test_tokens_are_those_of_transformers(name, settings, tmp_path):
    directory = codes(name, tmp_path, **settings)
    check_greedy(directory, serve(directory))


def test_compiled(tmp_path):
    directory = codes("llama", tmp_path, lm_head=True)
    check_greedy(directory, serve(directory, enforce_eager=False))


def test_files_that_restore_the_original_are_not_read(tmp_path):
    directory = floats("llama", tmp_path / "floats", torch.bfloat16)
    quantize_checkpoint(directory, tmp_path / "codes", QinsConfig(embeddings=True, lm_head=True), exact=True)
    assert len(list((tmp_path / "codes").glob("exact-*.safetensors"))) == 1
    check_greedy(tmp_path / "codes", serve(tmp_path / "codes"))


def test_smollm2(tmp_path):
    directory = encoded(find_model(), tmp_path, lm_head=True, embeddings=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_model())
    prompts = [tokenizer(t).input_ids for t in ("The capital of France is", "def fibonacci(n):\n", "Once upon a time")]
    check_greedy(directory, serve(directory, prompts, 32), prompts)


# -- what is refused --------------------------------------------------------------------------------------------------


def refusal(capfd, directory, **options):
    """Return what vLLM prints and raises on a model that it must refuse; its processes raise on their own."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 # vLLM decides which
        serve(directory, **options)
    printed = capfd.readouterr()
    return f"{raised.value}\n{printed.out}\n{printed.err}"


def test_floats_that_nobody_converted(tmp_path, capfd):
    directory = floats("llama", tmp_path)
    about = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(about | {"quantization_config": {"quant_method": "qins"}}))
    assert "vLLM loads codes but makes none, so convert the model with `qins quantize`" in refusal(capfd, directory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return codes("llama", tmp_path_factory.mktemp("llama"))


def test_tensor_parallel(llama, capfd, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")  # vLLM alone would refuse two ranks on a few cores
    assert "tensor_parallel_size: expected 1, got 2: under vLLM, codes are not split between ranks" in refusal(
        capfd, llama, tensor_parallel_size=2
    )


def test_lora(llama, capfd):
    assert "enable_lora: LoRA adapters are not added to codes under vLLM" in refusal(capfd, llama, enable_lora=True)


def test_layers_under_other_names(tmp_path, capfd):
    """vLLM calls Mixtral's experts otherwise, and would ignore their codes."""
    words = "vLLM's model has no layer for the codes of model.layers.0."
    assert words in refusal(capfd, codes("mixtral", tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(K_PROJ + "codes"), "the checkpoint has no codes for model.layers.1.self_attn.k_proj"),
        (
            lambda t: t.update({K_PROJ + "codes": t[K_PROJ + "codes"][:-1].clone()}),
            "model.layers.1.self_attn.k_proj.codes: expected shape (64, 128), got (63, 128)",
        ),
        (
            lambda t: t.update({K_PROJ + "weight": torch.zeros(64, 128)}),
            "model.layers.1.self_attn.k_proj.weight: expected codes (codes, scale, group_scale, mu), according to",
        ),
    ],
    ids=["missing", "short", "floats"],
)
def test_damaged(llama, tmp_path, capfd, change, words):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert words in refusal(capfd, tmp_path)


K_PROJ = "model.layers.1.self_attn.k_proj."
