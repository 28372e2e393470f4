"""The layers of vLLM that multiply codes: linear layers, joined ones too, embeddings and heads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from ..hf import check_layer
from ..nn import QINSEmbedding, QINSLinear, field_layout
from .experts import CodedExpertsMethod
from .stored import Stored, StoredMatrices

Tensor = torch.Tensor

_SHARDS = {"q": 0, "k": 1, "v": 2}


def method_of(layer: nn.Module, prefix: str, matrices: StoredMatrices, joined: Mapping[str, list[str]]) -> Any:
    """Return what computes a layer, or None to leave that to vLLM.

    Args:
        layer: of vLLM.
        prefix: its name.
        matrices: of the checkpoint.
        joined: see `StoredMatrices.parts`.

    Raises:
        ValueError: the layer has codes, and vLLM is set up in a way that codes do not support.

    """
    method: Any = None
    if isinstance(layer, LinearBase):
        parts = matrices.parts(prefix, joined)
        if not any(parts.values()):
            return UnquantizedLinearMethod()
        method = CodedLinearMethod(parts, matrices)
    elif isinstance(layer, VocabParallelEmbedding) and prefix in matrices.known:
        method = CodedEmbeddingMethod(prefix, matrices)
    elif isinstance(layer, RoutedExperts) and (stacks := matrices.stacks(prefix)):
        method = CodedExpertsMethod(layer, prefix, stacks, matrices)
    if method is not None:
        check_setup()
    return method


def check_setup() -> None:
    """Raise a ValueError if vLLM is set up in a way that codes do not support."""
    config = get_current_vllm_config()
    if not current_platform.is_cpu():
        raise ValueError(f"device: codes run under vLLM's build for CPUs, got {current_platform.device_name}")
    ranks = config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (size := getattr(ranks, name)) > 1:
            raise ValueError(
                f"{name}: expected 1, got {size}: under vLLM, codes are not split between ranks; use "
                "data_parallel_size, or transformers' tensor parallel"
            )
    if config.lora_config is not None:
        raise ValueError("enable_lora: LoRA adapters are not added to codes under vLLM; use PEFT")


class CodedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Multiplies by the codes of a layer's matrices, each of which keeps its own.

    vLLM's joined layers have one weight. Codes of matrices cannot be joined, since each has its own curvature or range,
    and may have its own codec. So the layer gets a module for each, `matrices`. Empty parameters, named as the fields
    of codes, only receive what is loaded.
    """

    def __init__(self, parts: dict[str, Stored | None], matrices: StoredMatrices) -> None:
        self.parts, self.stored = parts, matrices

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add modules that wait for their codes; arguments are vLLM's.

        Raises:
            ValueError: the layer does not consist of the checkpoint's matrices.

        """
        sizes = output_partition_sizes if len(self.parts) > 1 else [sum(output_partition_sizes)]
        if len(sizes) != len(self.parts):
            raise ValueError(f"{', '.join(self.parts)}: expected {len(sizes)} matrices, the checkpoint has others")
        expect(layer, self.parts, sizes, input_size_per_partition, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded.

        Raises:
            ValueError: something is missing, or does not fit.

        """
        self.stored.check_claimed()
        for name, matrix in zip(self.parts, layer.matrices, strict=True):
            check(name, matrix)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ W.T + bias, in x's dtype."""
        ys = [matrix(x) for matrix in layer.matrices]
        y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)
        return y if bias is None else y + bias


class CodedEmbeddingMethod(CodedLinearMethod):
    """Looks rows up in the codes of an embedding, or multiplies by those of a head, which may be the same."""

    def __init__(self, name: str, matrices: StoredMatrices) -> None:
        super().__init__({name: matrices.known[name]}, matrices)
        self.name, self.shared = name, matrices.known[name].shared
        matrices.claimed.add(name)

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], *args: Any, **kwargs: Any
    ) -> None:
        """Add a module that waits for its codes, which have no rows for vLLM's padding; arguments are vLLM's."""
        self.stored.created[self.name] = layer
        super().create_weights(layer, input_size_per_partition, [layer.org_vocab_size], *args, **kwargs)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Return the head as it is: the checkpoint, and not config.json, says whose codes it shares."""
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the shared codes, if there are such, and check what was loaded."""
        if self.shared:
            source = self.stored.created.get(self.shared)
            if source is None:
                raise ValueError(
                    f"{self.name}: shares codes of {self.shared}, which vLLM's model has under another name"
                )
            layer.matrices[0]._buffers.update(source.matrices[0]._buffers)
        super().process_weights_after_loading(layer)
        if not isinstance(layer, ParallelLMHead):
            codes = layer.matrices[0]
            layer.lookup = QINSEmbedding(
                codes.out_features, codes.in_features, codec=codes.codec, group_size=codes.group_size, device="meta",
                dtype=codes.weight_dtype,
            )  # fmt: skip
            layer.lookup._buffers.update(codes._buffers)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Return the rows of these words, (...) to (..., columns)."""
        rows: Tensor = layer.lookup(input_)
        return rows

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits; words of vLLM's padding have none, and get minus infinity."""
        y = layer.matrices[0](x)
        padding = layer.num_embeddings_per_partition - y.shape[-1]
        y = nn.functional.pad(y, (0, padding), value=float("-inf")) if padding else y
        return y if bias is None else y + bias


def expect(layer: Any, parts: dict[str, Stored | None], sizes: list[int], columns: int, dtype: torch.dtype) -> None:
    """Give a layer modules without codes, `matrices`, and parameters that receive what is loaded.

    Args:
        layer: of vLLM.
        parts: name of each matrix to how it is stored; None for one of floats.
        sizes: rows of each matrix.
        columns: of all of them.
        dtype: of the matrices of floats, and of dequantized ones.

    """
    layer.matrices = nn.ModuleList()
    # `weight` receives matrices of floats, and the empty one that stands beside codes (see `guard` in hf/names.py)
    fields = {"weight": dtype}
    for rows, stored in zip(sizes, parts.values(), strict=True):
        matrix: nn.Module
        if stored is None:
            matrix = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
        else:
            codec, size, _ = stored
            matrix = QINSLinear(columns, rows, bias=False, codec=codec, group_size=size, device="meta", dtype=dtype)
            fields |= {field: kind for field, (_, kind) in field_layout(codec, (rows, columns), size).items()}
        layer.matrices.append(matrix)
    named = list(zip(parts, layer.matrices, strict=True))
    for field, kind in fields.items():
        receiver = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
        receiver.weight_loader = partial(receive, named, field)  # type: ignore[attr-defined]
        layer.register_parameter(field, receiver)


def receive(
    named: list[tuple[str, Any]], field: str, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None
) -> None:
    """Take a copy of a tensor of the checkpoint; vLLM calls this as the parameter's `weight_loader`.

    Args:
        named: names of the layer's matrices, and the modules that wait for them.
        field: of codes, or "weight".
        param: the parameter, which stays empty.
        loaded_weight: the tensor.
        loaded_shard_id: which of the matrices it belongs to, by number or as "q", "k" or "v"; None for the only one.

    Raises:
        ValueError: it is none of the matrix's tensors.

    """
    name, matrix = named[_SHARDS.get(loaded_shard_id, loaded_shard_id or 0)]
    coded = isinstance(matrix, QINSLinear)
    if coded and field in matrix._names:
        matrix._buffers[field] = loaded_weight.clone()
    elif not coded and field == "weight":
        matrix.weight = nn.Parameter(loaded_weight.to(matrix.weight.dtype, copy=True), requires_grad=False)
    elif field != "weight" or loaded_weight.numel():  # not the empty one
        expected = f"codes ({', '.join(matrix._names)})" if coded else "a float weight"
        raise ValueError(f"{name}.{field}: expected {expected}, according to config.json")


def check(name: str, matrix: nn.Module) -> None:
    """Raise a ValueError unless a matrix is loaded, in the right shape and dtype."""
    if any(t.is_meta for t in (*matrix.parameters(), *matrix.buffers())):
        raise ValueError(f"the checkpoint has no {'codes' if isinstance(matrix, QINSLinear) else 'weight'} for {name}")
    if isinstance(matrix, QINSLinear):
        check_layer(name, matrix)
