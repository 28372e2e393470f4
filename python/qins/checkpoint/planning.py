"""The plan of a conversion: what each tensor becomes, from config.json and the headers of the files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files import DTYPE_CODES, Checkpoint, ScaledCheckpoint, Target, check_counts
from ..hf import (
    Names,
    QinsConfig,
    QinsHfQuantizer,
    guard,
    input_embedding,
    loading,
    model_class,
    pending_experts,
    pending_layers,
    tied_output,
    tied_to,
)
from ..nn import field_layout


@dataclass
class Output:
    """A parameter of the model, made from one or several tensors of the checkpoint.

    Attributes:
        name: name of the parameter in the model.
        stem: its name in the new checkpoint; for codes, the prefix of their fields' names.
        module: the module whose weight it is, or the stack of experts; empty if it is not encoded.
        codec, group_size: format of the codes; no codec if it is not encoded.
        transposed: whether the matrix, or each matrix of a stack, is (in_features, out_features).
        is_stack: whether it is a stack of experts.
        guard: name of an empty tensor, at which loaders fail that do not support codes; empty for none.
        targets: the tensors to write.

    """

    name: str
    stem: str = ""
    module: str = ""
    codec: str = ""
    group_size: int | None = None
    transposed: bool = False
    is_stack: bool = False
    guard: str = ""
    targets: list[Target] = field(default_factory=list)


@dataclass
class Item:
    """Tensors of the checkpoint that are converted together.

    Attributes:
        name: name in the model of their first output.
        keys: their keys in the checkpoint, by source pattern of transformers' converter.
        outputs: the parameters that they become.
        converter: transformers' operations on them; None for a single tensor that is used as it is.

    """

    name: str
    keys: dict[str, list[str]]
    outputs: list[Output] = field(default_factory=list)
    converter: Any = None

    @property
    def targets(self) -> list[Target]:
        """The tensors to write for this item."""
        return [t for o in self.outputs for t in o.targets]

    @property
    def all_keys(self) -> list[str]:
        """Keys of all its tensors."""
        return [k for keys in self.keys.values() for k in keys]


@dataclass
class Plan:
    """The work of `quantize_checkpoint`, shard by shard.

    Attributes:
        items: source file to its items; an item belongs to the file of its first tensor.
        names: source file to name of the new file.
        shared: module to (codec, group_size, the module whose codes it shares).
        model: the model on the meta device, with modules that wait for their weights.

    """

    items: dict[Path, list[Item]] = field(default_factory=dict)
    names: dict[Path, str] = field(default_factory=dict)
    shared: dict[str, tuple[str, int | None, str]] = field(default_factory=dict)
    model: Any = None

    def outputs(self) -> Iterator[Output]:
        """Yield all outputs, in the files' order."""
        for items in self.items.values():
            for item in items:
                yield from item.outputs

    @property
    def encoded(self) -> list[Output]:
        """Outputs that are encoded."""
        return [o for o in self.outputs() if o.codec]

    @property
    def encoded_keys(self) -> list[str]:
        """Tensors of the checkpoint that become codes."""
        items = (item for items in self.items.values() for item in items)
        return [key for item in items if any(o.codec for o in item.outputs) for key in item.all_keys]

    @property
    def modules(self) -> dict[str, tuple[str, int | None, bool]]:
        """Linear module to (codec, group_size, transposed)."""
        linear = pending_layers(self.model)
        return {o.module: (o.codec, o.group_size, o.transposed) for o in self.encoded if o.module in linear}

    @property
    def nbytes(self) -> int:
        """Bytes of all new tensors."""
        return sum(t.nbytes for o in self.outputs() for t in o.targets)


def plan(checkpoint: Checkpoint, config: QinsConfig) -> tuple[Plan, QinsHfQuantizer]:
    """Decide what each tensor becomes.

    Raises:
        ValueError: transformers does not support the architecture, or a weight is missing or does not fit the model.

    """
    quantizer = QinsHfQuantizer(config, pre_quantized=False)
    model = _meta_model(checkpoint)
    quantizer._process_model_before_weight_loading(model, checkpoint_files=list(checkpoint.files))
    config.source_format = checkpoint.source_format if isinstance(checkpoint, ScaledCheckpoint) else None
    result = Plan(model=model)
    names = Names(model)
    wanted = _wanted(model, config, result, names)
    items = _without_copy(_items(names, checkpoint), checkpoint, names, config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    guarded = guard((o.module, o.is_stack) for outputs in wanted.values() for o in outputs if o.codec)
    for item in items:
        for name in _made_by(item):
            for output in wanted.pop(name, [Output(name)]):
                output.stem = output.stem or (names.saved(name) if item.converter else item.all_keys[0])
                if output.codec and guarded == (output.module if output.is_stack else f"{output.module}.weight"):
                    output.guard = output.stem
                item.outputs.append(output)
        _set_targets(checkpoint, shapes, item)
    missing = [o.module for outputs in wanted.values() for o in outputs]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{checkpoint.path}: no weight for {', '.join(missing[:3])}{more}")
    targets = [t.name for item in items for t in item.targets]
    twice = next((n for n, count in Counter(targets).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{checkpoint.path}: {twice}: a tensor has the name that a field of codes needs")
    for item in items:
        result.items.setdefault(checkpoint.where(item.all_keys[0]), []).append(item)
    result.items = {f: result.items[f] for f in checkpoint.files if f in result.items}
    for i, file in enumerate(result.items):
        single = len(result.items) == 1
        result.names[file] = (
            "model.safetensors" if single else f"model-{i + 1:05}-of-{len(result.items):05}.safetensors"
        )
    return result, quantizer


def _wanted(model: Any, config: QinsConfig, result: Plan, names: Names) -> dict[str, list[Output]]:
    """Return the outputs to encode, by the name of the float parameter that they are made from."""
    wanted: dict[str, list[Output]] = {}
    for module, layer in pending_layers(model).items():
        about = layer.codec, layer.group_size, layer.transposed
        wanted[f"{module}.weight"] = [Output(f"{module}.weight", "", module, *about)]
    for module, experts in pending_experts(model).items():
        for stack, size in experts.group_sizes.items():
            name = f"{module}.{stack}"
            about = experts.codec, size, bool(experts.is_transposed)
            wanted[name] = [Output(name, "", name, *about, is_stack=True)]
    output = tied_output(model) if config.lm_head else None
    if not config.embeddings and output is None:
        return wanted
    module, _, codec, size = input_embedding(model, config)
    key = f"{module}.weight"
    if config.embeddings:
        wanted[key] = [Output(key, "", module, codec, size)]
        result.shared = {m: (codec, size, module) for m in tied_to(model, module)}
    elif output is not None:
        wanted[key] = [Output(key), Output(key, names.saved(f"{output}.weight"), output, codec, size)]
    return wanted


def _without_copy(items: list[Item], checkpoint: Checkpoint, names: Names, config: QinsConfig) -> list[Item]:
    """Drop a stored output embedding if it is tied to the input embedding; its codes are made from the latter.

    Raises:
        ValueError: the two differ.

    """
    output = tied_output(names.model) if config.lm_head else None
    copy = next((i for i in items if output and i.name == f"{output}.weight"), None)
    if copy is None:
        return items
    module = input_embedding(names.model, config)[0]
    original = next((i for i in items if i.name == f"{module}.weight"), None)
    if original is None or not torch.equal(*(checkpoint.load(i.all_keys[0]) for i in (original, copy))):
        raise ValueError(f"{checkpoint.path}: {copy.name}: expected a copy of {module}, to which config.json ties it")
    return [i for i in items if i is not copy]


def _items(names: Names, checkpoint: Checkpoint) -> list[Item]:
    """Group the tensors by what they become."""
    found: dict[str, Item] = {}
    by_pattern = {p: c for c in names.converters for p in c.source_patterns}
    for key in sorted(checkpoint.tensors, key=_natural):
        name, pattern = names.loaded(key)
        if pattern is not None and name in names.state:
            item = found.setdefault(name, Item(name, {}, converter=by_pattern[pattern]))
            item.keys.setdefault(pattern, []).append(key)
        else:
            found[key] = Item(name, {key: [key]})
    return list(found.values())


def _made_by(item: Item) -> list[str]:
    """Return the model's names of the parameters that an item becomes."""
    if item.converter is None:
        return [item.name]
    targets = item.converter.target_patterns
    before, found, after = item.name.replace("*.", "0.").partition(targets[0])
    return [before + t + after for t in targets] if found else [item.name]


def _natural(key: str) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers in names as numbers, as transformers orders the experts."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


def _set_targets(checkpoint: Checkpoint, parameters: dict[str, tuple[int, ...]], item: Item) -> None:
    """Set the tensors to write for each output of an item; check that the stored tensors fit the model."""
    stored = checkpoint.tensors[item.all_keys[0]]
    shapes = {o.name: parameters[o.name] if o.codec or item.converter else stored.shape for o in item.outputs}
    if any(o.codec for o in item.outputs):
        elements = sum(math.prod(s) for s in shapes.values())
        got = sum(checkpoint.tensors[k].elements for k in item.all_keys)
        if item.converter is None and stored.shape != shapes[item.name]:
            raise ValueError(f"{checkpoint.path}: {item.name}: expected shape {shapes[item.name]}, got {stored.shape}")
        if elements != got:
            where = f"{len(item.all_keys)} tensors, such as {item.all_keys[0]}"
            raise ValueError(f"{checkpoint.path}: {item.name}: expected {elements:,} weights, got {got:,} in {where}")
    for o in item.outputs:
        shape = shapes[o.name]
        if not o.codec:
            if stored.dtype not in DTYPE_CODES:
                raise ValueError(f"{o.stem}: expected a dtype that safetensors and torch share, got {stored.dtype}")
            o.targets = [Target(o.stem, stored.dtype, shape)]
            continue
        shape = (*shape[:-2], shape[-1], shape[-2]) if o.transposed else shape
        # fields are `<module>.<field>`; for experts `<module>.<stack>_<field>`
        o.stem = f"{o.stem}_" if o.is_stack else o.stem.removesuffix("weight")
        for n, (s, dtype) in field_layout(o.codec, shape, o.group_size).items():
            o.targets.append(Target(o.stem + n, str(dtype)[6:], s))
        if o.guard:
            o.targets.append(Target(o.guard, "uint8", (0,)))


def converted(item: Item, model: Any, load: Callable[[str], torch.Tensor]) -> dict[str, Any]:
    """Return the parameters that an item becomes, by name; a stack of experts may be an iterator of matrices."""
    if item.converter is None:
        return {item.name: load(item.all_keys[0])}
    from ..hf import one_by_one

    matrices = one_by_one(item.converter.operations, item.keys, load, _patterns(item, model))
    if matrices is not None and all(o.is_stack and o.codec for o in item.outputs):
        return {item.name: matrices}
    converter = deepcopy(item.converter)
    for pattern, keys in item.keys.items():
        for key in keys:
            converter.add_tensor(item.name, key, pattern, lambda key=key: load(key))
    made = converter.convert(item.name, model=model, config=model.config)
    made = made[0] if isinstance(made, tuple) else made  # transformers 5.0 also returns errors
    return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}


def _patterns(item: Item, model: Any) -> dict[str, Any]:
    c = item.converter
    return {
        "source_patterns": c.source_patterns, "target_patterns": c.target_patterns, "full_layer_name": item.name,
        "model": model, "config": model.config, "missing_keys": None,
    }  # fmt: skip


def architecture(checkpoint: Checkpoint) -> Any:
    """Return transformers' class of the model."""
    # transformers 4 saves the architecture of Qwen2-VL in text_config
    text = checkpoint.config.get("text_config") or {}
    name = (checkpoint.config.get("architectures") or text.get("architectures") or [""])[0]
    cls = model_class(name)
    if cls is None:
        raise ValueError(f"{checkpoint.path}: this version of transformers has no architecture {name!r}")
    return cls


def _meta_model(checkpoint: Checkpoint) -> Any:
    import transformers

    if not checkpoint.config:
        raise ValueError(f"{checkpoint.path}: expected a directory with a config.json, got none")
    if "quantization_config" in checkpoint.config:
        raise ValueError(f"{checkpoint.path}: is quantized already: {checkpoint.config['quantization_config']}")
    config = getattr(checkpoint, "transformers_config", None)  # of a GGUF file
    if config is None:
        check_counts(checkpoint.path / "config.json", checkpoint.config, len(checkpoint.tensors))
        with loading("the config.json of a model", checkpoint.path):
            config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    cls = architecture(checkpoint)
    with torch.device("meta"):
        return cls(config)
