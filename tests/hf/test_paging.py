"""Decode steps in the paged cache of continuous batching: the same answers as the modules'."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import long_but

transformers = pytest.importorskip("transformers")
pytest.importorskip(
    "transformers.generation.continuous_batching.cache_allocators", reason="NOT RUN: transformers < 5.23"
)
from families import FAMILIES, divergence, family, layers_of, without_steps  # noqa: E402

from qins import _core  # noqa: E402
from qins.hf import decoding, paging  # noqa: E402

pytestmark = pytest.mark.once


def answers(model, prompts, tokens):
    """Return each request's tokens, and the inputs and logits of each call of the model."""
    seen = []

    def see(_, args, given, out):
        seen.append((given["input_ids"].clone(), out.logits.clone()))

    hook = model.register_forward_hook(see, with_kwargs=True)
    try:
        out = model.generate_batch(
            prompts, transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                page_size=32, num_blocks=24, max_batch_tokens=64, max_memory_percent=1.0
            ),
            progress_bar=False,
        )  # fmt: skip
    finally:
        hook.remove()
    return sorted((o.prompt_ids, o.generated_tokens) for o in out.values()), seen


def paged_steps(model):
    """Return whether each layer has proved its step in a paged cache."""
    kinds = [layer._qins_step._proved if layer._qins_step else () for layer in layers_of(model)]
    return [any(paging.Pages in k for k in of_layer) for of_layer in kinds]


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 160, (n,), generator=generator).tolist() for n in lengths]


ONE, SOME = (5,), (3, 40, 70, 12)


@pytest.mark.parametrize(
    "case", long_but([("Llama", ONE), ("Qwen3Moe", SOME)], [("Llama", ONE), *((f, SOME) for f in FAMILIES)])
)
def test_same_answers_as_the_modules(case):
    """Requests that begin and end at different times, in pages of 32 tokens, and beyond sliding windows of 8."""
    name, lengths = case
    model = family(name)
    given = prompts(*lengths)
    got, seen = answers(model, given, 40)
    steps = paged_steps(model)
    assert all(steps)
    without_steps(model)
    want, wanted = answers(model, given, 40)
    assert len(got) == len(lengths)
    assert got == want
    assert len(seen) == len(wanted) >= 40
    for (ids, logits), (same_ids, same) in zip(seen, wanted, strict=True):
        assert torch.equal(ids, same_ids)
        assert divergence(logits, same) < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = family("Llama").to(dtype)
    given = prompts(20, 33)
    _, seen = answers(model, given, 16)
    assert all(paged_steps(model))
    without_steps(model)
    _, wanted = answers(model, given, 16)
    same = [a[1] for a, b in zip(seen, wanted, strict=True) if torch.equal(a[0], b[0])]
    want = [b[1] for a, b in zip(seen, wanted, strict=True) if torch.equal(a[0], b[0])]
    assert len(same) >= 2  # until a tie is decided otherwise
    for a, b in zip(same, want, strict=True):
        assert (a - b).abs().max() < (0.05 if dtype is torch.bfloat16 else 0.01) * b.abs().max()


def test_more_requests_than_a_step_takes():
    """Those of a call with more run the modules; when fewer are left, steps take over."""
    model = family("Llama")
    given = prompts(*range(4, 23))
    got, seen = answers(model, given, 12)
    rows = {ids.shape[1] for ids, _ in seen}
    assert max(rows) > decoding.MOST_ROWS
    without_steps(model)
    assert got == answers(model, given, 12)[0]


def test_a_step_that_differs_is_dropped(monkeypatch, caplog):
    model = family("Llama")
    want, _ = answers(model, prompts(9, 30), 12)
    model = family("Llama")
    monkeypatch.setattr(decoding, "agree", lambda *_: False)
    with caplog.at_level(logging.INFO, "qins"):
        got, _ = answers(model, prompts(9, 30), 12)
    assert "its results differ" in caplog.text
    assert not any(paged_steps(model))
    assert got == want


def test_what_a_hook_sees_is_the_modules():
    model = family("Llama")
    answers(model, prompts(9), 4)
    calls = []
    model.model.layers[2].mlp.register_forward_hook(lambda *_: calls.append(1))
    answers(model, prompts(9), 4)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("slot", "begin"), [([3, 40], [0, 2]), ([3, -1], [0, 2]), ([3, 4], [0, 3]), ([3, 4], [0, 0]), ([3, 4], [-1, 2])]
)
def test_pages_of_another_cache(slot, begin):
    """Nothing is read or written outside of the cache."""
    model = family("Llama")
    answers(model, prompts(9), 4)
    about = layers_of(model)[0]._qins_step.about
    states = torch.zeros(2, 40, about.kv_heads, about.head_dim)
    x, turns = torch.zeros(1, 1, about.hidden), torch.zeros(about.head_dim)
    pages = paging.Pages(states[0], states[1], torch.tensor(slot), torch.tensor(begin, dtype=torch.int32))
    with pytest.raises(ValueError, match="pages: expected slots from 0 to 39"):
        _core.decode_layer(
            about.core, 0, x.data_ptr(), x.data_ptr(), 1, 1, states[0].data_ptr(), states[1].data_ptr(), 0, 0,
            turns.data_ptr(), turns.data_ptr(), about.head_dim, about.head_dim, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0,
            *pages.pages,
        )  # fmt: skip
    assert not states.any()
