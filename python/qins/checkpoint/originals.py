"""Files that restore the original of codes which transformers saved: `QinsConfig(exact=True)` and `save_pretrained`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..files import (
    Checkpoint,
    EncodedLayer,
    check_restorable,
    encoded_layers,
    exact_name,
    load_layer,
    open_checkpoint,
    others_of,
)
from ..hf import QinsConfig
from .planning import Item, Output, Plan, converted, plan
from .quantizing import copied_names, directory_of
from .recording import ItemRecorder, same_bits


def check_original(source: Path, config: QinsConfig) -> None:
    """Raise the ValueError that says why a checkpoint cannot be restored from codes.

    Args:
        source: directory of the original.
        config: how it is quantized.

    """
    _plan(source, config)


def record_original(source: Path, out: Path) -> None:
    """Write what restores an original bit for bit, beside the codes that a model made of it has saved.

    What differs from the original, such as a norm that was trained or saved in another dtype, is stored whole.

    Args:
        source: directory of the original.
        out: directory of the codes; `exact-*.safetensors` in it are replaced.

    Raises:
        OSError, ValueError: no partial file is left under a final name.

    """
    codes = open_checkpoint(out)
    checkpoint, planned = _plan(source, QinsConfig(**codes.config["quantization_config"]))
    saved = _Saved(codes, planned)
    written = set()
    for i, file in enumerate(checkpoint.files):
        target = out / exact_name(file.name)
        others = others_of(directory_of(checkpoint), copied_names(checkpoint), out) if i == 0 else {}
        with ItemRecorder(checkpoint, planned, file, target, others) as recorder:
            for item in planned.items.get(file, ()):
                saved.record(item, recorder)
            recorder.write()
        written.add(target)
    for path in {*out.glob(exact_name("*"))} - written:  # of another original
        path.unlink()


def _plan(source: Path, config: QinsConfig) -> tuple[Checkpoint, Plan]:
    checkpoint = open_checkpoint(source)
    check_restorable(checkpoint, [])
    config = QinsConfig(**config.to_dict())  # planning changes it
    config.calibration = None
    planned, _ = plan(checkpoint, config)
    check_restorable(checkpoint, planned.encoded_keys)
    return checkpoint, planned


class _Saved:
    """What transformers saved, by the names of the original."""

    def __init__(self, codes: Checkpoint, planned: Plan) -> None:
        self.codes, self.model = codes, planned.model
        self.layers = {layer.name: layer for layer in encoded_layers(codes, [])}
        self.prefix = f"{planned.model.base_model_prefix}."

    def record(self, item: Item, recorder: ItemRecorder) -> None:
        """Record an item: residuals to the codes of its layers, or where equal bits are, or its tensors whole."""
        layers = [layer for o in item.outputs if o.codec and (layer := self._layer(o)) is not None]
        if len(layers) == len(item.outputs):
            made = converted(item, self.model, recorder.checkpoint.load)
            for output, layer in zip(item.outputs, layers, strict=True):
                output.stem = f"{layer.name}."  # what ItemRecorder calls it
                floats = made[output.name]
                for part, (matrix, encoded) in enumerate(
                    zip(floats if output.is_stack else [floats], load_layer(self.codes, layer), strict=True)
                ):
                    recorder.matrix(item, output, part if output.is_stack else None, matrix, encoded)
            recorder.item(item)
            return
        for key in item.all_keys:
            name = self._equal(item, key, recorder.checkpoint)
            if name is None:
                recorder.exact.raw(key)
            else:
                recorder.exact.stored(key, name)

    def _layer(self, output: Output) -> EncodedLayer | None:
        """Return the codes of an output, if there are any of its shape."""
        shape = tuple(self.model.get_parameter(output.name).shape)
        if output.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        found = (self.layers.get(name) for name in (*self._names(output.stem[:-1]), *self._names(output.module)))
        return next((f for f in found if f and (f.shape, f.is_stack) == (shape, output.is_stack)), None)

    def _equal(self, item: Item, key: str, checkpoint: Checkpoint) -> str | None:
        """Return the name of the saved tensor that has the bits of an original one; None if there is none."""
        names = [n for n in (*self._names(key), *self._names(item.name)) if n in self.codes.tensors]
        loaded = checkpoint.load(key) if names else torch.empty(0)
        return next((n for n in names if same_bits(self.codes.load(n), loaded)), None)

    def _names(self, name: str) -> Iterator[str]:
        """Yield the names that a tensor or a layer may have: a model may be saved without its head, or with one."""
        yield name
        yield name.removeprefix(self.prefix)
        yield self.prefix + name
