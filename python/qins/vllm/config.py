"""What vLLM asks of a quantization method."""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from .stored import StoredMatrices

# Some of vLLM's models give their input embedding no name; these are the last parts of its names in transformers.
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


class CodesConfig(QuantizationConfig):  # type: ignore[misc] # vLLM may be missing
    """The quantization method "qins"."""

    def __init__(self, matrices: StoredMatrices) -> None:
        super().__init__()
        self.matrices = matrices

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CodesConfig:
        """Read the quantization config of config.json; raises as StoredMatrices does."""
        return cls(StoredMatrices(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the matrices as vLLM's model renames modules."""
        self.matrices.rename(hf_to_vllm_mapper)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Drop what restores an original (`qins quantize --exact`): vLLM reads all of a directory's safetensors."""
        names = "|".join(re.escape(n) for n in self.matrices.names)
        return WeightsMapper(orig_to_new_regex={re.compile(f"^(?:{names})$"): None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return what computes a layer: a method of ours if it has codes."""
        from .methods import method_of  # imports all of vLLM's layers

        return method_of(layer, prefix or self._embedding(), self.matrices, self.packed_modules_mapping)

    def _embedding(self) -> str:
        """Return the name of the input embedding, for models that do not tell it."""
        names = [n for n in self.matrices.known if n.rpartition(".")[2] in _INPUT_EMBEDDINGS]
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
