"""QINSCache against transformers' own cache."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import qins

transformers = pytest.importorskip("transformers")


def states(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5).to(dtype)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=120, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("codecs", "error"),
    [
        (("float16", "log8"), 0.02),
        (("float16", "golden"), 0.02),
        (("log8", "log8"), 0.02),
        (("float16", "log6"), 0.03),
        (("log6", "log4"), 0.1),
        (("log5", "log5"), 0.06),
        (("log4", "log4"), 0.1),
    ],
)
def test_logits_with_a_cache(llama, codecs, error):
    ids = torch.randint(0, 120, (2, 40))
    exact = llama(ids).logits
    cache = qins.QINSCache(llama.config, k_codec=codecs[0], v_codec=codecs[1])
    parts = [llama(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 30), (30, 31), (31, 40))]
    logits = torch.cat(parts, 1)
    assert float((logits - exact).norm() / exact.norm()) < error
    assert cache.get_seq_length() == 40
    saved = cache.memory_savings()
    assert saved["float32_bytes"] == 3 * 2 * 2 * 2 * 40 * 16 * 4
    assert saved["total_bytes"] < saved["float16_bytes"] * (1.2 if "golden" in codecs else 0.85)


def generate(model, ids, **kwargs):
    kwargs = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generate_as_with_the_dynamic_cache(llama, more):
    ids = torch.randint(0, 120, (2, 9))
    exact = generate(llama, ids, **more)
    got = generate(llama, ids, past_key_values=qins.QINSCache(llama.config, v_codec="float16"), **more)
    # random weights have no clear favorites: beams that tie may swap, but not in the first tokens
    assert torch.equal(exact[:, :10], got[:, :10])


@torch.no_grad()
def test_assisted_generation_crops(llama):
    ids = torch.randint(0, 120, (1, 9))
    cache = qins.QINSCache(llama.config, v_codec="float16")
    got = generate(llama, ids, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(got[:, :10], generate(llama, ids)[:, :10])


@torch.no_grad()
@pytest.mark.parametrize("codecs", [("float16", "log8"), ("log6", "log5"), ("log4", "log4")])
def test_layers_of_a_cache(llama, codecs):
    ids = torch.randint(0, 120, (2, 200))
    cache = qins.QINSCache(k_codec=codecs[0], v_codec=codecs[1])
    llama(ids, past_key_values=cache)
    layer = cache.layers[0]
    k, v = layer.tokens._keys.read(2, 200, torch.float32), layer.tokens._values.read(2, 200, torch.float32)
    for clone in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        clone.layers[0].reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(clone.layers[0].tokens._keys.read(2, 200, torch.float32), k[[1, 0]])
        clone.batch_repeat_interleave(2)
        clone.batch_select_indices(torch.tensor([0, 3]))
        assert torch.equal(clone.layers[0].tokens._values.read(2, 200, torch.float32), v[[1, 0]])
        clone.crop(-50)
        assert clone.get_seq_length() == 150
        clone.layers[0].crop(120)
        assert clone.get_seq_length() == 120
        assert clone.layers[0].get_mask_sizes(3) == (123, 0)
        clone.reset()
        assert clone.get_seq_length() == 0
    assert cache.get_seq_length() == 200
    assert cache.get_max_length() == -1


def test_refuses_other_layers():
    config = transformers.LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        qins.QINSCache(config)
    with pytest.raises(ValueError, match="k_codec"):
        qins.QINSCache(k_codec="q8")
