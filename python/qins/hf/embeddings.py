"""Quantizing a model's embeddings, and an output embedding that shares their weight, once everything is loaded."""

from __future__ import annotations

from typing import Any, TypeVar

import transformers
from torch import nn

from ..nn import Coded, CodedWeight, QINSEmbedding, QINSLinear, affine
from ..system import page_out
from .config import QinsConfig
from .modules import put
from .names import name_of, with_and_without_prefix

AnyCoded = TypeVar("AnyCoded", bound=Coded)

_VERSION = int(transformers.__version__.partition(".")[0])


def tied_output(model: Any) -> str | None:
    """The name of the output embedding, if its weight is the input embedding's."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        return None
    name = name_of(model, output)
    if _VERSION >= 5:
        tied: dict[str, str] = model.all_tied_weights_keys
        return name if f"{name}.weight" in {*tied, *tied.values()} else None
    return name if model.config.get_text_config(decoder=True).tie_word_embeddings else None


def tied_to(model: Any, source: str) -> list[str]:
    """Modules whose weight is that of `source`."""
    output = tied_output(model)
    if _VERSION < 5:
        return [output] if output else []
    return [k.removesuffix(".weight") for k, v in model.all_tied_weights_keys.items() if v == f"{source}.weight"]


def input_embedding(model: Any, config: QinsConfig) -> tuple[str, nn.Embedding, str, int | None]:
    """Name and module of the input embedding, and the codec and group size that it gets, and what is tied to it."""
    source: nn.Embedding = model.get_input_embeddings()
    name = name_of(model, source)
    return name, source, *config.layer(name, source.embedding_dim)


def expect_embeddings(model: Any, config: QinsConfig) -> None:
    """Raise for what cannot be done with embeddings, before anything is loaded.

    Raises:
        ValueError: the embeddings are to be quantized, but compute something else than rows times a factor plus a bias,
            or the output tied to them is not to be quantized; or transformers 4 would tie codes.

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
            f"embeddings: {output} of {type(model).__name__} is tied to them, and would keep the floats; give "
            "lm_head=True, too"
        )
    if _VERSION < 5 and model.config.is_encoder_decoder:
        raise ValueError("lm_head: of an encoder-decoder model whose embeddings are tied it needs transformers 5")


def encode_embeddings(model: Any, config: QinsConfig) -> None:
    """Replace the input embedding, and what is tied to it, by codes of the weight that has been loaded."""
    output = tied_output(model) if config.lm_head else None
    if not config.embeddings and output is None:
        return
    _, source, codec, size = input_embedding(model, config)
    weight = source.weight
    names = {m: n for n, m in model.named_modules()}
    replaced: dict[nn.Module, QINSEmbedding | QINSLinear] = {}
    if config.embeddings:
        codes = loaded(QINSEmbedding.from_embedding(source, codec, group_size=size))
        replaced[source] = codes
        for module in names:
            if isinstance(module, nn.Embedding) and module is not source and module.weight is weight:
                replaced[module] = _sharing(codes, QINSEmbedding.from_encoded(module, None, codec, size))
    if output is not None:
        linear = model.get_submodule(output)
        if config.embeddings:
            replaced[linear] = _sharing(codes, QINSLinear.from_encoded(linear, None, codec, size))
        else:
            replaced[linear] = loaded(QINSLinear.from_linear(linear, codec, group_size=size))
    for old, new in replaced.items():
        put(model, names[old], old, new)
    untie(model, {names[old] for old in replaced})
    page_out(weight.data)


def _sharing(codes: CodedWeight, module: AnyCoded) -> AnyCoded:
    """Let a module have another one's codes, which are saved once."""
    module._buffers.update(codes._buffers)
    module._non_persistent_buffers_set.update(module._names)
    return module


def loaded(module: AnyCoded) -> AnyCoded:
    """Mark a module's codes as transformers 5 marks what came from a checkpoint."""
    for name in module._names:
        module.get_buffer(name).__dict__["_is_hf_initialized"] = True
    return module


def share_codes(model: Any, shared: dict[str, str]) -> dict[str, str]:
    """Let modules expect no codes of their own, since they will share another one's; return the two's names.

    Args:
        model: with all modules in place.
        shared: name of each such module to that of the other in the checkpoint's model, which may have a prefix.

    """
    modules = dict(model.named_modules())
    found = {}
    for name, source in shared.items():
        found[name] = next(n for n in with_and_without_prefix(model, source) if n in modules)
        modules[name]._non_persistent_buffers_set.update(modules[name]._names)
    untie(model, {n for n, m in modules.items() if isinstance(m, CodedWeight)})
    return found


def untie(model: Any, names: set[str]) -> None:
    """Keep transformers from tying the weights of these modules, which are codes now."""
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
