"""Mixtures of experts of codes under vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ..hf import check_layer
from ..nn import QINSExperts
from .stored import Stored, StoredMatrices

Tensor = torch.Tensor

STACKS = ("gate_up_proj", "down_proj")


class Experts(nn.Module):
    """Experts as most models of transformers have them, on the meta device: QINSExperts takes sizes from it."""

    def __init__(self, count: int, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.has_bias, self.has_gate = count, False, False, True
        shapes = (count, 2 * intermediate, hidden), (count, hidden, intermediate)
        for stack, shape in zip(STACKS, shapes, strict=True):
            self.register_parameter(stack, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class CodedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Multiplies by the codes of the experts that vLLM's router chooses.

    The layer gets a QINSExperts, `codes`. Stacks of codes keep the names that they have in the checkpoint, which vLLM's
    own loading of experts does not know, so it is replaced.
    """

    def __init__(self, layer: Any, name: str, stacks: dict[str, Stored], matrices: StoredMatrices) -> None:
        super().__init__(layer.moe_config)
        self.name, self.stacks, self.stored = name, stacks, matrices

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add a module that waits for its codes; arguments are vLLM's.

        Raises:
            ValueError: these experts compute what QINSExperts does not.

        """
        if (
            layer.activation is not MoEActivation.SILU
            or layer.moe_config.has_bias
            or layer.swiglu_limit is not None
            or layer.apply_router_weight_on_input
            or set(self.stacks) != set(STACKS)
        ):
            raise ValueError(f"{self.name}: expected experts with gates, SiLU and no biases, as Qwen3's")
        codec = self.stacks["down_proj"].codec
        original = Experts(num_experts, hidden_size, intermediate_size_per_partition, params_dtype)
        layer.codes = QINSExperts(original, codec, {s: a.group_size for s, a in self.stacks.items()})
        layer.load_weights = lambda weights: self._load(layer.codes, weights)

    def _load(self, codes: QINSExperts, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Take copies of tensors of the checkpoint; yield their names."""
        for field, tensor in weights:
            if field in codes._names:
                codes._buffers[field] = tensor.clone()
            elif field not in STACKS or tensor.numel():  # not the empty one that stands beside codes
                raise ValueError(f"{self.name}.{field}: expected codes, according to config.json")
            yield field

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded.

        Raises:
            ValueError: something is missing, or does not fit.

        """
        self.stored.check_claimed()
        if any(t.is_meta for t in layer.codes.buffers()):
            raise ValueError(f"the checkpoint has no codes for {self.name}")
        check_layer(self.name, layer.codes)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return nothing: no kernel of vLLM's runs."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Return each token's weighted sum of its experts' outputs; vLLM itself runs the shared experts."""
        y: Tensor = layer.codes(x, topk_ids, topk_weights)
        return y
