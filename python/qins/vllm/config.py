"""Which of a model's layers have codes: vLLM's view of the quantization config in config.json."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from ..hf import QinsConfig

# Some of vLLM's models give their input embedding no name; these are the last parts of its names in transformers.
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


class Stored(NamedTuple):
    """How a checkpoint stores a matrix: codec, group size and, if it has none of its own, whose codes it shares."""

    codec: str
    group_size: int | None
    shared: str | None = None


class CodesConfig(QuantizationConfig):  # type: ignore[misc] # vLLM may be missing
    """A checkpoint's list of matrices of codes.

    Attributes:
        modules: vLLM's name of each matrix to how it is stored.
        names: their names in the checkpoint.
        created: name of each embedding and head that this process has created to vLLM's layer.

    """

    def __init__(self, modules: dict[str, Stored]) -> None:
        super().__init__()
        self.modules, self.names = modules, frozenset(modules)
        self.created: dict[str, Any] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CodesConfig:
        """Read the quantization config of config.json.

        Raises:
            ValueError, TypeError: it is not one of saved codes, or of another version of qins.

        """
        modules = QinsConfig(**config).modules
        if modules is None:
            raise ValueError(
                "quantization_config: expected the list of quantized modules of a saved checkpoint; vLLM loads codes "
                "but makes none, so convert the model with `qins quantize`"
            )
        return cls({name: Stored(*about) for name, about in modules.items()})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the matrices as vLLM's model renames modules."""
        self.modules = {
            new: about._replace(shared=about.shared and hf_to_vllm_mapper.map_name(about.shared))
            for name, about in self.modules.items()
            if (new := hf_to_vllm_mapper.map_name(name)) is not None
        }

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Drop what restores the original (`qins quantize --exact`): vLLM reads all safetensors files of a directory."""
        names = "|".join(re.escape(n) for n in {*self.modules, *self.names})
        return WeightsMapper(orig_to_new_regex={re.compile(f"^(?:{names})$"): None})

    def parts(self, prefix: str) -> dict[str, Stored | None]:
        """Return the matrices of one of vLLM's layers, in the order of its outputs; None for those of floats.

        A layer has several if vLLM joins what the checkpoint has apart, such as q_proj, k_proj and v_proj.
        """
        parent, dot, last = prefix.rpartition(".")
        joined = [] if prefix in self.modules else self.packed_modules_mapping.get(last, [])
        names = [f"{parent}{dot}{n}" for n in joined] or [prefix]
        return {n: self.modules.get(n) for n in names}

    def stacks(self, prefix: str) -> dict[str, Stored]:
        """Return the stacks of matrices of a module of experts."""
        return {n.removeprefix(prefix + "."): a for n, a in self.modules.items() if n.startswith(prefix + ".")}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return what computes a layer: a method of ours if it has codes."""
        from .methods import method_of  # imports all of vLLM's layers

        return method_of(self, layer, prefix or self._embedding())

    def _embedding(self) -> str:
        """Return the name of the input embedding, for models that do not tell it."""
        names = [n for n in self.modules if n.rpartition(".")[2] in _INPUT_EMBEDDINGS]
        return names[0] if len(names) == 1 else ""

    def get_name(self) -> str:
        """Return the name of the quantization method."""
        return "qins"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations that codes are multiplied with."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least CUDA capability: any, since no layer runs on such a device."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: config.json has the quantization config."""
        return []
