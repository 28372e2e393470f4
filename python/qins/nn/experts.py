"""QINSExperts: the experts of a mixture as stacks of codes; a token reads only the experts that it is routed to.

transformers 5 keeps the experts of a layer in three-dimensional parameters (`gate_up_proj` or `up_proj`, and
`down_proj`). Their classes share one calling convention: hidden states, the experts chosen for each token, and their
routing weights. Llama 4, and GPT-OSS in transformers 4, have conventions of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..codec import (
    EXPERT_STACKS,
    EncodedArray,
    code_columns,
    decode_fields,
    encode,
    fallback_note,
    field_names,
    format_of,
    resolve_group_size,
)
from .coded import Coded, Matrix, field_layout
from .ops import multiply_codes, multiply_codes_transposed

Tensor = torch.Tensor


def projections(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the stacks of matrices that can be quantized; none unless the module holds experts."""
    told = hasattr(module, "is_transposed") and hasattr(module, "has_bias") and hasattr(module, "num_experts")
    if not (told or type(module).__name__ in _UNTOLD):
        return ()
    stacks = [n for n in EXPERT_STACKS if getattr(module._parameters.get(n), "ndim", 0) == 3]
    if len(stacks) != 2 or getattr(module, "_is_expert_parallel", False):
        return ()
    return tuple(stacks)


def stack_sizes(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Return (experts, out_features, in_features) of one of a module's projections."""
    e, a, b = module._parameters[name].shape  # type: ignore[union-attr]
    return (e, b, a) if getattr(module, "is_transposed", True) else (e, a, b)


def format_of_experts(
    module: nn.Module, codec: str, group_size: int | str | None
) -> tuple[str, dict[str, int | None], str]:
    """Return codec and group sizes of a module's projections, and a note if log8 replaces a packed codec."""
    widths = {stack: stack_sizes(module, stack)[2] for stack in projections(module)}
    note = ""
    for width in widths.values():  # all projections have one codec
        if told := fallback_note(codec, width):
            note, (codec, group_size) = told, format_of(codec, group_size, width)
    return codec, {stack: resolve_group_size(codec, group_size, w) for stack, w in widths.items()}, note


def _plain_gate(module: Any, gate_up: Tensor) -> Tensor:
    """Llama 4's activation, which in its class is only part of a larger function."""
    gate, up = gate_up.chunk(2, dim=-1)
    y: Tensor = up * module.act_fn(gate)
    return y


def _clamped_gate(module: Any, gate_up: Tensor) -> Tensor:
    """GPT-OSS's activation, in transformers 4."""
    gate = gate_up[..., ::2].clamp(max=module.limit)
    up = gate_up[..., 1::2].clamp(min=-module.limit, max=module.limit)
    return (up + 1) * gate * torch.sigmoid(gate * module.alpha)


# Classes whose matrices are transposed although no attribute says so: whether they have biases, and their activation.
_UNTOLD: dict[str, tuple[bool, Callable[[Any, Tensor], Tensor]]] = {
    "GptOssExperts": (True, _clamped_gate), "Llama4TextExperts": (False, _plain_gate),
}  # fmt: skip


def _runs(experts: Tensor, count: int) -> Iterator[tuple[int, slice]]:
    """Yield each expert's rows; numbers beyond the last expert mark masked rows."""
    numbers, counts = torch.unique_consecutive(experts, return_counts=True)
    begin = 0
    for e, n in zip(numbers.tolist(), counts.tolist(), strict=True):
        if 0 <= e < count:
            yield e, slice(begin, begin + n)
        begin += n


def _by_expert(
    x: Tensor, experts: Tensor, fields: list[Tensor], codec: str, group_size: int, multiply: Callable[..., Tensor],
    columns: int,
) -> Tensor:  # fmt: skip
    out = x.new_zeros(x.shape[0], columns)
    for e, rows in _runs(experts, fields[0].shape[0]):
        out[rows] = multiply(x[rows], [f[e] for f in fields], codec, group_size or None)
    return out


@torch.library.custom_op(
    "qins::grouped_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor experts, Tensor[] fields, str codec, SymInt group_size) -> Tensor",
)
def grouped_linear(x: Tensor, experts: Tensor, fields: list[Tensor], codec: str, group_size: int) -> Tensor:
    """Multiply each row of x, (S, K), by the transposed matrix of its expert; (S, N).

    `experts`, (S,), is sorted and names each row's expert. Rows whose number matches no expert become zeros. `fields`
    have the experts as their first dimension.
    """
    return _by_expert(x, experts, fields, codec, group_size, multiply_codes, fields[0].shape[1])


@grouped_linear.register_fake
def _grouped_linear_shape(x: Tensor, experts: Tensor, fields: list[Tensor], codec: str, group_size: int) -> Tensor:
    return x.new_empty(x.shape[0], fields[0].shape[1])


@torch.library.custom_op(
    "qins::grouped_linear_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor experts, Tensor[] fields, str codec, SymInt group_size) -> Tensor",
)
def grouped_linear_backward(g: Tensor, experts: Tensor, fields: list[Tensor], codec: str, group_size: int) -> Tensor:
    """Multiply each row of g, (S, N), by the matrix of its expert; (S, K)."""
    return _by_expert(
        g, experts, fields, codec, group_size, multiply_codes_transposed, code_columns(codec, fields[0].shape[2])
    )


@grouped_linear_backward.register_fake
def _grouped_backward_shape(g: Tensor, experts: Tensor, fields: list[Tensor], codec: str, group_size: int) -> Tensor:
    return g.new_empty(g.shape[0], code_columns(codec, fields[0].shape[2]))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, experts, fields, ctx.codec, ctx.group_size = inputs
    ctx.save_for_backward(experts, *fields)


def _differentiated(op: Callable[..., Tensor]) -> Callable[..., Any]:
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        experts, *fields = ctx.saved_tensors
        return op(g.contiguous(), experts, fields, ctx.codec, ctx.group_size), None, [None] * len(fields), None, None

    return backward


grouped_linear.register_autograd(_differentiated(grouped_linear_backward), setup_context=_save)
grouped_linear_backward.register_autograd(_differentiated(grouped_linear), setup_context=_save)


class QINSExperts(Coded):
    """Experts that store their matrices as logarithmic codes; replaces a module of transformers.

    Each expert's matrix of each projection is encoded separately. The codes are buffers named `<projection>_<field>`,
    with the experts as their first dimension. Matrices are (out_features, in_features), even where the original has
    them transposed. Biases stay parameters.

    Args:
        original: the module to replace; everything but its stacks of matrices is shared, not copied.
        codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".
        group_sizes: of each projection.

    """

    def __init__(self, original: nn.Module, codec: str, group_sizes: Mapping[str, int | None]) -> None:
        """Make a module on the meta device; `encode` or `load_state_dict(assign=True)` fills in the codes."""
        super().__init__()
        stacks = projections(original)
        self.__dict__.update({k: v for k, v in vars(original).items() if k not in self.__dict__})
        self._parameters.update({k: v for k, v in original._parameters.items() if k not in stacks})
        self._modules.update(original._modules)
        if not hasattr(original, "is_transposed"):
            self.is_transposed, self.has_bias = True, _UNTOLD[type(original).__name__][0]
        self.original = type(original)
        self.training = original.training
        self.codec, self.group_sizes = codec, dict(group_sizes)
        self._dtype: torch.dtype = original._parameters[stacks[0]].dtype  # type: ignore[union-attr]
        names = []
        self.shapes = {stack: stack_sizes(original, stack) for stack in stacks}
        for stack, shape in self.shapes.items():
            for field, (s, dtype) in field_layout(codec, shape, self.group_sizes[stack]).items():
                self.register_buffer(f"{stack}_{field}", torch.empty(s, dtype=dtype, device="meta"))
                names.append(f"{stack}_{field}")
        self._names = tuple(names)

    @classmethod
    def from_experts(cls, original: nn.Module, codec: str, group_sizes: Mapping[str, int | None]) -> QINSExperts:
        """Quantize a module's experts.

        Args:
            original: the float module.
            codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".
            group_sizes: of each projection.

        Returns:
            the quantized module.

        Raises:
            ValueError: a weight is NaN or infinite; the message names projection and expert.

        """
        new = cls(original, codec, group_sizes)
        for stack in new.shapes:
            new._buffers.update(new.encode(stack, original._parameters[stack].detach()))  # type: ignore[union-attr]
        return new

    def encode(self, stack: str, matrices: Tensor | Iterator[Tensor]) -> dict[str, Tensor]:
        """Encode the original's matrices of a projection one by one; return the buffers by name."""
        fields = field_names(self.codec, self.group_sizes[stack])
        buffers = {f"{stack}_{n}": torch.empty_like(self.get_buffer(f"{stack}_{n}"), device="cpu") for n in fields}
        for i, encoded in self.encode_each(stack, matrices):
            for n in fields:
                buffers[f"{stack}_{n}"][i] = torch.from_numpy(np.asarray(encoded.fields[n]))
            del encoded  # freed before the next one is made
        return buffers

    def encode_each(
        self, stack: str, matrices: Tensor | Iterator[Tensor], only: range | None = None
    ) -> Iterator[tuple[int, EncodedArray]]:
        """Encode the original's matrices of a projection; yield the number and the codes of each, or of `only` some.

        Raises:
            ValueError: a matrix has another shape, there are more or fewer, or a weight is NaN or infinite.

        """
        experts, out_features, in_features = self.shapes[stack]
        count = 0
        for matrix in matrices:
            w = matrix.T if self.is_transposed else matrix
            if count == experts or w.shape != (out_features, in_features):
                expected = f"{experts} matrices {(out_features, in_features)}"
                raise ValueError(f"{stack}: expected {expected}, got {tuple(w.shape)} at {count}")
            if only is None or count in only:
                try:
                    encoded = encode(w, self.codec, group_size=self.group_sizes[stack])
                except ValueError as e:
                    raise ValueError(f"{stack}[{count}]: {e}") from None
                yield count, encoded
                del encoded
            count += 1
            del matrix, w  # freed before the next one is made
        if count != experts:
            raise ValueError(f"{stack}: expected {experts} matrices, got {count}")

    def fields(self, stack: str) -> list[Tensor]:
        """Return the codes of a projection, experts first, in the operators' order."""
        names = field_names(self.codec, self.group_sizes[stack])
        return [self._buffers[f"{stack}_{n}"] for n in names]  # type: ignore[misc]

    def matrices(self, name: str) -> Iterator[Matrix]:
        """Yield the stacks, named `<module>.<projection>`."""
        for stack, shape in self.shapes.items():
            yield f"{name}.{stack}", shape, self.group_sizes[stack], self.fields(stack)

    def encoded(self, stack: str, expert: int) -> EncodedArray:
        """Return one expert's matrix as an EncodedArray that shares its memory (CPU only); every field is checked."""
        group_size = self.group_sizes[stack]
        names = field_names(self.codec, group_size)
        arrays = {n: f[expert].numpy() for n, f in zip(names, self.fields(stack), strict=True)}
        return EncodedArray.from_fields(self.codec, arrays, group_size)

    def weight(self, stack: str) -> Tensor:
        """Return the dequantized matrices of a projection, (experts, out_features, in_features)."""
        group_size = self.group_sizes[stack]
        names = field_names(self.codec, group_size)
        return torch.stack([
            decode_fields(self.codec, dict(zip(names, fields, strict=True)), group_size, self._dtype)
            for fields in zip(*self.fields(stack), strict=True)
        ])  # fmt: skip

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        of_class = getattr(self.original, "_apply_gate", None) or _UNTOLD[self.original.__name__][1]
        y: Tensor = of_class(self, gate_up)
        return y

    def _project(self, stack: str, x: Tensor, experts: Tensor) -> Tensor:
        y: Tensor = grouped_linear(x, experts, self.fields(stack), self.codec, self.group_sizes[stack] or 0)
        if self.has_bias:
            bias: Tensor = self._parameters[f"{stack}_bias"]  # type: ignore[assignment]
            y = y + bias[experts.clamp(max=self.shapes[stack][0] - 1)].to(y.dtype)
        return y

    def _outputs(self, x: Tensor, k: int, experts: Tensor) -> Tensor:
        """Return the outputs of these experts; the i-th takes row i // k of x."""
        experts, order = experts.sort(stable=True)
        y = self._project(next(iter(self.shapes)), x[order // k], experts)
        y = self._apply_gate(y) if getattr(self, "has_gate", True) else self.act_fn(y)  # type: ignore[operator]
        y = self._project("down_proj", y, experts)
        return y[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        """Return each token's weighted sum of its experts' outputs.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k), the chosen experts; a number beyond the last expert chooses none.
            top_k_weights: (tokens, k), their routing weights.
            router_indices: as top_k_index (GPT-OSS of transformers 4, whose hidden_states are (batch, tokens, hidden)).
            routing_weights: (tokens, experts), together with router_indices.

        Without any of these (Llama 4), hidden_states are (experts * tokens, hidden): the input of each expert, zeros
        where it was not chosen. The outputs have that shape, too.

        """
        shape, x = hidden_states.shape, hidden_states.flatten(0, -2)
        if router_indices is not None and routing_weights is not None:
            top_k_index = router_indices
            top_k_weights = routing_weights.gather(1, router_indices.clamp(max=routing_weights.shape[1] - 1))
        if top_k_index is None or top_k_weights is None:
            count = self.shapes["down_proj"][0]
            experts = torch.arange(count, device=x.device).repeat_interleave(len(x) // count)
            return self._outputs(x, 1, experts.masked_fill((x == 0).all(1), count))
        tokens, k = top_k_index.shape
        y = self._outputs(x, k, top_k_index.reshape(-1))
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)  # type: ignore[operator]
        y = y * top_k_weights.reshape(-1, 1)
        return y.view(tokens, k, -1).sum(1).to(hidden_states.dtype).view(shape)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a module of the original class with the dequantized matrices."""
        new = self.original.__new__(self.original)
        nn.Module.__init__(new)
        ours = {"original", "codec", "group_sizes", "shapes", "_dtype", "_names"}
        new.__dict__.update({k: v for k, v in vars(self).items() if k not in new.__dict__ and k not in ours})
        new.training = self.training
        new._modules.update(self._modules)
        for stack in self.shapes:
            w = self.weight(stack).to(dtype or self._dtype)
            w = w.transpose(1, 2).contiguous() if self.is_transposed else w
            new.register_parameter(stack, nn.Parameter(w))
        for name, p in self._parameters.items():
            new.register_parameter(name, p)
        return new

    def extra_repr(self) -> str:
        """Projections, codec and group sizes."""
        sizes = ", ".join(f"{n}={'x'.join(map(str, s))}" for n, s in self.shapes.items())
        groups = ", ".join(f"{n}: {g}" for n, g in self.group_sizes.items() if g)
        return f"{sizes}, codec={self.codec}" + (f", group_sizes={{{groups}}}" if groups else "")
