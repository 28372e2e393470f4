"""GGUF files as a source of float weights, with the names, shapes and head order of transformers.

transformers' own tables map the names and undo the rearrangements of llama.cpp's conversion, one tensor at a time.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .reading import Checkpoint, StoredTensor, check_counts

_READING = threading.RLock()


@contextmanager
def reading_once() -> Iterator[None]:
    """Let transformers and us read the header of each GGUF file once, by keeping what the gguf package has read.

    transformers reads it anew for a model's configuration, tensors and tokenizer, 7 to 15 s each for a vocabulary of
    50,000 tokens, and makes the table of tensor names once for each module.
    """
    import gguf

    with _READING:
        own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        try:
            for name, reads in own.items():
                setattr(gguf, name, functools.cache(reads))  # nobody changes what it returns
            yield
        finally:
            for name, reads in own.items():
                setattr(gguf, name, reads)


@dataclass
class GgufCheckpoint(Checkpoint):
    """A GGUF file; each tensor is dequantized to float32 when it is loaded.

    Attributes:
        transformers_config: the model's configuration, from the file's metadata.

    """

    decodes = True

    transformers_config: Any = None
    _tensors: dict[str, Any] = field(default_factory=dict)
    _processor: Any = None

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor in float32.

        Raises:
            ValueError: it does not have the shape that the model expects.

        """
        from gguf import dequantize

        t = self._tensors[name]
        weights = self._processor.process(
            weights=dequantize(t.data, t.tensor_type), name=t.name, tensor_key_mapping={}, parsed_parameters={}
        ).weights
        shape = self.tensors[name].shape
        if weights.shape != shape:
            raise ValueError(f"{self.path}: {t.name}: expected shape {shape} for {name}, got {weights.shape}")
        return torch.from_numpy(np.array(weights, np.float32))

    def save_tokenizer(self, out: Path) -> None:
        """Write the file's tokenizer, if it has one."""
        if self.metadata.get("tokenizer"):
            file = next(iter(self.files))
            args: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
            transformers.AutoTokenizer.from_pretrained(file.parent, **args).save_pretrained(out)


@reading_once()
def open_gguf(checkpoint: Checkpoint) -> GgufCheckpoint:
    """Open a GGUF file as a transformers model; only its header is read.

    Raises:
        ValueError: transformers does not support the architecture, the model has experts, or it is split into several
            files.

    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    (file,) = checkpoint.files
    reader = gguf.GGUFReader(str(file))
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise ValueError(f"{file}: expected a whole model, got one of several files; join them with gguf-split")
    others = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
    numbers = {name: f.contents() for name, f in reader.fields.items() if f.types[0] not in others}
    check_counts(file, numbers, len(reader.tensors))
    parsed = load_gguf_checkpoint(str(file), return_tensors=False)  # type: ignore[no-untyped-call]
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    classes: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in classes:
        raise ValueError(f"{file}: expected a causal language model, got {type(config).__name__}")
    cls = classes[type(config)]
    config.architectures = [cls.__name__]
    with torch.device("meta"):
        model = cls(config)
    kind = str(reader.fields["general.architecture"].contents())
    processors: dict[str, Any] = TENSOR_PROCESSORS
    processor = processors.get(kind, TensorProcessor)(config=parsed.get("config", {}))
    weights_map: Any = get_gguf_hf_weights_map
    more = (processor,) if "processor" in inspect.signature(weights_map).parameters else ()  # transformers 5
    names = weights_map(model, *more)
    settings = json.loads(config.to_json_string())
    dtype = "dtype" if "dtype" in settings or int(transformers.__version__[0]) >= 5 else "torch_dtype"
    result = GgufCheckpoint(
        checkpoint.path, "gguf", checkpoint.files, config=settings | {dtype: "float32"},
        transformers_config=config, _processor=processor,
    )  # fmt: skip
    if "tokenizer.ggml.model" in reader.fields:
        result.metadata["tokenizer"] = str(reader.fields["tokenizer.ggml.model"].contents())
    state = model.state_dict()
    for i, t in enumerate(reader.tensors):
        if "_exps" in t.name:
            raise ValueError(f"{file}: {t.name}: experts in GGUF files are not supported; quantize the original model")
        name = names.get(t.name)
        if name not in state:
            continue  # transformers skips these too: tables that it computes itself
        shape = tuple(state[name].shape)
        result.tensors[name] = StoredTensor(name, "float32", shape, 4 * math.prod(shape), (str(file), i))
        result._where[name], result._tensors[name] = file, t
    return result
