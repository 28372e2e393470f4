"""Quantizing a model's embeddings, and an output embedding tied to them, once everything is loaded."""

from __future__ import annotations

from typing import Any, TypeVar

import transformers
from torch import nn

from ..codec import encode, warn_if_slow
from ..nn import Coded, CodedWeight, QINSEmbedding, QINSLinear, affine
from ..system import page_out
from .config import QinsConfig
from .modules import put
from .names import name_of, with_and_without_prefix
from .parallel import install, is_parallel, whole_tensor

AnyCoded = TypeVar("AnyCoded", bound=Coded)

_VERSION = int(transformers.__version__.partition(".")[0])


def tied_output(model: Any) -> str | None:
    """Return the name of the output embedding if it is tied to the input embedding, else None."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        return None
    name = name_of(model, output)
    if _VERSION >= 5:
        tied: dict[str, str] = model.all_tied_weights_keys
        return name if f"{name}.weight" in {*tied, *tied.values()} else None
    return name if model.config.get_text_config(decoder=True).tie_word_embeddings else None


def tied_to(model: Any, source: str) -> list[str]:
    """Return the names of the modules whose weight is tied to that of `source`."""
    output = tied_output(model)
    if _VERSION < 5:
        return [output] if output else []
    return [k.removesuffix(".weight") for k, v in model.all_tied_weights_keys.items() if v == f"{source}.weight"]


def input_embedding(model: Any, config: QinsConfig) -> tuple[str, nn.Embedding, str, int | None]:
    """Return name and module of the input embedding, and codec and group size for it and for what is tied to it."""
    source = model.get_input_embeddings()
    if not isinstance(source, nn.Embedding):
        raise ValueError(f"embeddings: expected an nn.Embedding in {type(model).__name__}, got {type(source).__name__}")
    name = name_of(model, source)
    return name, source, *config.layer(name, source.embedding_dim)


def expect_embeddings(model: Any, config: QinsConfig) -> None:
    """Check that the embeddings can be quantized as configured, before anything is loaded.

    Raises:
        ValueError: embeddings to quantize compute something other than rows times a factor plus a bias, or the output
            tied to them stays float; or transformers 4 would tie codes.

    """
    if config.embeddings:
        name, *_ = input_embedding(model, config)
        for same in [name, *tied_to(model, name)]:
            module = model.get_submodule(same)
            if isinstance(module, nn.Embedding):
                try:
                    affine(module, form_only=True)
                except ValueError as e:
                    raise ValueError(f"embeddings: {same} is {e}") from None
    output = tied_output(model)
    if output is None or not (config.embeddings or config.lm_head):
        return
    if config.embeddings and not config.lm_head:
        raise ValueError(
            f"embeddings: {output} of {type(model).__name__} is tied to them, and would keep the floats; pass "
            "lm_head=True too"
        )
    if _VERSION < 5 and model.config.is_encoder_decoder:
        raise ValueError("lm_head: needs transformers 5 for an encoder-decoder model with tied embeddings")


def encode_embeddings(model: Any, config: QinsConfig) -> None:
    """Quantize the loaded input embedding and what is tied to it, as configured."""
    output = tied_output(model) if config.lm_head else None
    if not config.embeddings and output is None:
        return
    _, source, codec, size = input_embedding(model, config)
    weight = source.weight
    warn_if_slow(codec, size)
    encoded = encode(whole_tensor(weight), codec, group_size=size)
    names = {m: n for n, m in model.named_modules()}
    replaced: dict[nn.Module, QINSEmbedding | QINSLinear] = {}
    if config.embeddings:
        codes = loaded(QINSEmbedding.from_encoded(source, encoded, codec, size))
        replaced[source] = codes
        for module in names:
            if isinstance(module, nn.Embedding) and module is not source and module.weight is weight:
                replaced[module] = _sharing(codes, QINSEmbedding.from_encoded(module, None, codec, size))
    if output is not None:
        linear = model.get_submodule(output)
        if config.embeddings:
            replaced[linear] = _sharing(codes, QINSLinear.from_encoded(linear, None, codec, size))
        else:
            replaced[linear] = loaded(QINSLinear.from_encoded(linear, encoded, codec, size))
    for old, new in replaced.items():
        put(model, names[old], old, new)
        if is_parallel(model):
            install(model, names[old], new)
    untie(model, {names[old] for old in replaced})
    page_out(weight.data)


def _sharing(codes: CodedWeight, module: AnyCoded) -> AnyCoded:
    """Make a module share another one's codes, which are then saved only once."""
    module._buffers.update(codes._buffers)
    module._non_persistent_buffers_set.update(module._names)
    return module


def loaded(module: AnyCoded) -> AnyCoded:
    """Mark a module's codes as loaded, as transformers 5 marks tensors from a checkpoint."""
    for name in module._names:
        module.get_buffer(name).__dict__["_is_hf_initialized"] = True
    return module


def share_codes(model: Any, shared: dict[str, str]) -> dict[str, str]:
    """Mark modules as sharing another module's codes, so that they expect none of their own.

    Args:
        model: with all modules in place.
        shared: name of each such module to the name of the other one in the checkpoint, with or without prefix.

    Returns:
        name of each such module to the name of the other one in this model.

    """
    modules = dict(model.named_modules())
    found = {}
    for name, source in shared.items():
        found[name] = next(n for n in with_and_without_prefix(model, source) if n in modules)
        modules[name]._non_persistent_buffers_set.update(modules[name]._names)
    untie(model, {n for n, m in modules.items() if isinstance(m, CodedWeight)})
    return found


def untie(model: Any, names: set[str]) -> None:
    """Keep transformers from tying the weights of these modules, which are now quantized."""
    if _VERSION < 5:
        output = tied_output(model)
        if output in names:
            for config in (model.config, model.config.get_text_config(decoder=True)):
                config.tie_word_embeddings = False
        return
    weights = {f"{n}.weight" for n in names}
    for path, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel):
            prefix = path + "." if path else ""
            for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
                tied = getattr(module, attribute, None)
                if isinstance(tied, dict):
                    left = {k: v for k, v in tied.items() if prefix + k not in weights}
                    setattr(module, attribute, left)
