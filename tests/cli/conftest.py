"""A model that talks."""

from __future__ import annotations

import pytest

import qins


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directory of a small quantized Llama with a tokenizer; its float original is in `float` beside it."""
    from tiny import make
    from tokens import save_tokenizer

    path = tmp_path_factory.mktemp("talking")
    made = make("llama")
    made.save_pretrained(path / "float")
    quantized = type(made).from_pretrained(path / "float", quantization_config=qins.QinsConfig())
    quantized.save_pretrained(path / "model")
    save_tokenizer(path / "model")
    return path / "model"
