"""Tensor parallel on CPUs: what one rank computes and saves, two, three and four ranks compute and save."""

from __future__ import annotations

import filecmp

import pytest
import torch

import qins

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.distributed.sharding_utils", reason="tensor parallel needs transformers 5.23")
import parallel_models as work  # noqa: E402
from ranks import on_ranks  # noqa: E402
from tiny import outputs  # noqa: E402

pytestmark = pytest.mark.once

AUTO = {"tp_plan": "auto"}
EXPERTS = {"tp_size": 2, "ep_size": 2}
WHOLE = {"embeddings": True, "lm_head": True}
GATHERED = {
    "tp_size": 2,
    "tp_plan": {
        **{f"model.layers.*.self_attn.{p}_proj": "colwise_gather_output" for p in "qkv"},
        "model.layers.*.self_attn.o_proj": "rowwise_split_input",
    },
}
# ranks, model, settings of QinsConfig, distributed config
CASES = {
    "llama": (2, "llama", {}, AUTO),
    "codes in every layer": (2, "llama", WHOLE, AUTO),
    "tied codes": (2, "llama, tied", WHOLE, AUTO),
    "tied floats": (2, "llama, tied", {}, AUTO),
    "tied, codes of the output alone": (2, "llama, tied", {"lm_head": True}, AUTO),
    "biases": (2, "llama, biases", {}, AUTO),
    "golden": (2, "llama", {"codec": "golden"} | WHOLE, AUTO),
    "log9": (2, "llama", {"codec": "log9"}, AUTO),
    "log4": (2, "llama", {"codec": "log4"} | WHOLE, AUTO),
    "groups of 32": (2, "llama", {"group_size": 32}, AUTO),
    "groups of 128": (2, "llama", {"group_size": 128}, AUTO),
    "groups of 192": (2, "llama", {"group_size": 192}, AUTO),
    "no groups": (2, "llama", {"group_size": None}, AUTO),
    "phi3": (2, "phi3", {}, AUTO),
    "phi3.5": (2, "phi3.5", {}, AUTO),
    "qwen2": (2, "qwen2", {}, AUTO),
    "qwen3": (2, "qwen3", {}, AUTO),
    "gemma2": (2, "gemma2", WHOLE, AUTO),
    "mixtral": (2, "mixtral", {}, AUTO),
    "mixtral in log4": (2, "mixtral", {"codec": "log4"}, AUTO),
    "qwen3_moe": (2, "qwen3_moe", {"codec": "golden"}, AUTO),
    "whole experts": (2, "mixtral", {}, EXPERTS),
    "whole experts with biases": (2, "gpt_oss", {}, EXPERTS),
    "smollm2, gathered": (2, "smollm2", {}, GATHERED),
    "smollm2": (3, "smollm2", WHOLE, AUTO),
    "llama on four": (4, "llama, four heads", {}, AUTO),
    "phi3.5 on four": (4, "phi3.5", {"codec": "log4"}, AUTO),
    "mixtral on four": (4, "mixtral, four heads", {}, AUTO),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a function from a case to its directory, its one-rank model, and what the ranks found."""
    where = tmp_path_factory.mktemp("parallel")
    found: dict[int, dict] = {}
    models: dict[str, str] = {}

    def one(case):
        _, model, settings, _ = CASES[case]
        path = where / case
        source = where / "floats" / model
        if model not in models:
            models[model] = work.save(model, source)
        path.mkdir()
        (path / "float").symlink_to(source)
        cls = getattr(transformers, models[model])
        quantized = cls.from_pretrained(source, quantization_config=qins.QinsConfig(**settings))
        quantized.save_pretrained(path / "1")
        quantized.save_pretrained(path / "1 again", max_shard_size="20KB")
        return path, quantized

    def get(case):
        ranks = CASES[case][0]
        if ranks not in found:  # one start of the ranks serves all cases
            cases = [c for c, about in CASES.items() if about[0] == ranks]
            models_of = {c: one(c) for c in cases}
            told = [(type(models_of[c][1]).__name__, str(models_of[c][0]), CASES[c][2], CASES[c][3], {}) for c in cases]
            by_rank = on_ranks(ranks, work.on_rank, told)
            found[ranks] = {c: (*models_of[c], [r[i] for r in by_rank]) for i, c in enumerate(cases)}
        return found[ranks][case]

    return get


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_and_save_as_one(results, case):
    path, one, ranks = results(case)
    assert [r.get("error") for r in ranks] == [None] * len(ranks)
    logits = outputs(one)
    for r in ranks:
        for got in (r["logits"], r["logits of codes"]):
            assert torch.equal(got, ranks[0]["logits"])
            assert (got - logits).norm() < 2e-4 * logits.norm()
        assert torch.equal(r["tokens"], work.tokens(one))
        assert r["same"]
        assert r["report"] == work.report(one)  # of the whole, not of the part
    whole = work.held(one)
    assert whole <= sum(r["held"] for r in ranks) < 1.35 * whole
    assert max(r["held"] for r in ranks) < 0.7 * whole
    for kind in ("", " again"):
        expected, saved = path / f"1{kind}", path / f"{len(ranks)}{kind}"
        files = sorted(p.name for p in expected.iterdir())
        assert files == sorted(p.name for p in saved.iterdir())
        assert filecmp.cmpfiles(expected, saved, files, shallow=False) == (files, [], [])
    assert not qins.inspect(path / str(len(ranks))).problems


@pytest.mark.long
def test_gradients(tmp_path):
    name = work.save("llama", tmp_path)
    expected = work.input_gradient(name, str(tmp_path))
    for got in on_ranks(2, work.input_gradient, name, str(tmp_path), AUTO):
        assert (got - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.long
def test_refusals(tmp_path):
    """Every rank raises before it reads a weight, so none waits for another."""
    pytest.importorskip("peft")
    for name in ("llama", "smollm2"):
        work.save(name, tmp_path / name)
    work.save_gpt2(tmp_path / "gpt2")
    (tmp_path / "text").write_text("some text")
    codes = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "smollm2", quantization_config=qins.QinsConfig())
    codes.save_pretrained(tmp_path / "smollm2 codes")
    first, second = on_ranks(2, work.refusals, str(tmp_path))
    assert first == second
    heads = "tensor parallel: model.layers.0.self_attn.q_proj has 9 heads of 64, which 2 ranks do not divide"
    assert first.pop("heads").startswith(heads)
    assert first.pop("heads of codes").startswith(heads)
    assert first == {
        "lora": "LoRA: a rank has a part of this layer's codes, expected a model on one rank",
        "convert": "model.embed_tokens.weight: sharded between ranks, expected a whole weight; quantize while the "
        "model loads, with quantization_config=qins.QinsConfig()",
        "conv1d": "tensor parallel: transformer.h.0.mlp.c_fc: a Conv1D, whose weight is transposed, is not supported, "
        "with 2 ranks and 'rowwise'",
        "calibration": "calibration: needs the whole model, expected one rank; calibrate with `qins quantize`, and "
        "load its codes",
        "fsdp": "distributed_config: qins supports tensor and expert parallelism (tp_size, ep_size) only",
        "dequantize": "dequantize: this rank has only its part of the codes, expected a model on one rank",
        "distributed checkpoint": "distributed_checkpoint: codes are saved whole, from the first rank; omit it",
    }


def test_older_versions_of_transformers(monkeypatch):
    from qins.hf import parallel

    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda name: None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**work.WIDE | {"num_hidden_layers": 1}))
    parallel.check_ranks(model)
    model._tp_size = 2  # as these versions note it
    for call in (parallel.require_plans, lambda: parallel.check_ranks(model)):
        with pytest.raises(ValueError, match=r"tensor parallel: expected transformers 5.23 or newer, got"):
            call()


@pytest.mark.long
def test_memory(tmp_path):
    """A rank holds half of the codes, and little more than its part and one tensor while it loads them."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 1024}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    model.save_pretrained(tmp_path / "float")
    floats = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    qins.convert(model, exclude=["lm_head"])
    model.save_pretrained(tmp_path / "codes")
    whole = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    del model
    work.save("llama", tmp_path / "small")
    assert floats > 250e6
    for codes in (False, True):
        for peak, held in on_ranks(2, work.peak_while_loading, str(tmp_path), codes):
            print(f"codes: {codes}, {peak / 1e6:.0f} MB at the peak, {held / 1e6:.0f} MB held, {whole / 1e6:.0f} whole")
            assert held < 0.52 * whole
            # less than the whole's codes, so that they are never held together
            assert peak < held + largest + 8e6 < whole
