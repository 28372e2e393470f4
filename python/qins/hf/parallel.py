"""Tensor parallel: transformers' plans say what each rank keeps of a module, and qins cuts its codes accordingly.

transformers shards float parameters while it reads them. Codes are cut from whole matrices instead: some of their
parameters, such as log8's mu, describe the whole, and borders may be inside groups. The collective operations of
transformers' plans, which wrap each module's forward, are the same.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
import transformers
from torch import nn

from ..nn import Coded, QINSEmbedding, QINSExperts, QINSLinear, field_layout
from ..system import let_go
from .modules import PendingLinear, coded_modules
from .parts import Part, Span, buffer_name, narrow, part_of, parts_of

Tensor = torch.Tensor


def is_parallel(model: Any) -> bool:
    """Return whether transformers loads, or has loaded, this model on several ranks."""
    config = getattr(model.config, "distributed_config", None)
    sizes = ("tp_size", "ep_size", "fsdp_size", "dp_replicate_size", "pp_size")
    return config is not None and any((getattr(config, n, None) or 1) > 1 for n in sizes)


def plan_parts(model: Any) -> None:
    """Note in each module of codes what this rank keeps of it, before transformers installs its plan.

    Raises:
        ValueError: the plan cannot be followed; the message names the layer.

    """
    config = model.config.distributed_config
    if any((getattr(config, n, None) or 1) > 1 for n in ("fsdp_size", "dp_replicate_size", "pp_size")):
        raise ValueError("distributed_config: qins supports tensor and expert parallelism (tp_size, ep_size) only")
    require_plans()
    from torch.distributed.device_mesh import init_device_mesh

    ranks = max(config.tp_size or 1, config.ep_size or 1)
    rules = _rules(model, config)
    _check_heads(model, rules, ranks)
    model.save_distributed_checkpoint = _refuse_distributed_checkpoint
    with torch.device("cpu"):  # while a model loads, the default device is meta
        mesh = init_device_mesh("cpu", (ranks,))
        for name, module in coded_modules(model):
            note_parts(name, module, rules, mesh)
            for stack in getattr(module, "shapes", ()):
                _drop_rule(model, config, f"{name}.{stack}", module)


def check_ranks(model: Any) -> None:
    """Raise a ValueError if a version of transformers whose plans qins does not know has sharded this model."""
    if (getattr(model, "_tp_size", None) or 1) > 1 and not is_parallel(model):
        require_plans()


def require_plans() -> None:
    """Raise a ValueError if this version of transformers has no tensor parallel that qins supports."""
    if importlib.util.find_spec("transformers.distributed.sharding_utils") is None:
        raise ValueError(
            f"tensor parallel: expected transformers 5.23 or newer, got {transformers.__version__}; without "
            "tp_plan, the model runs on one rank"
        )


def note_parts(name: str, module: Coded, rules: Mapping[str, str], mesh: Any) -> None:
    """Note in a module what this rank keeps of its matrices, and adapt its forward to a part."""
    parts = {}
    for matrix, shape, group_size, _ in module.matrices(name):
        stack = matrix.removeprefix(f"{name}.") if isinstance(module, QINSExperts) else ""
        style = _rule(rules, f"{name}.{stack or 'weight'}")
        if style is None:
            continue
        try:
            spans = _spans(style, module, shape, mesh)
            if spans is not None:
                parts[stack] = part_of(module.codec, shape, group_size, spans)
        except ValueError as e:
            raise ValueError(f"tensor parallel: {matrix}: {e}, with {mesh.size()} ranks and {style!r}") from None
    module.__dict__["_hf_quantized_needs_local_tp"] = True  # its products take torch's own tensors only
    if parts:
        module.__dict__["parts"] = parts
        _adapt_forward(name, module)


def part_of_matrix(module: Coded, name: str, matrix: str) -> Part | None:
    """Return what this rank keeps of one of a module's `matrices(name)`; None if it is whole."""
    return parts_of(module).get(matrix.removeprefix(name).removeprefix("."))


def _refuse_distributed_checkpoint(*args: Any, **kwargs: Any) -> None:
    raise ValueError("distributed_checkpoint: codes are saved whole, from the first rank; omit it")


# -- plans ----------------------------------------------------------------------------------------


def _rules(model: Any, config: Any) -> dict[str, str]:
    """Return the plan that transformers will apply: style by name of a module or parameter, with `*` for numbers."""

    def plan(size: int | None, own: Mapping[str, str] | None, given: Any) -> dict[str, str]:
        if (size or 1) == 1 or given == {}:
            return {}
        return {**(own or {}), **(given if isinstance(given, dict) else {})}

    tensors = plan(config.tp_size, model.tp_plan, config.tp_plan)
    experts = plan(config.ep_size, model.ep_plan, config.ep_plan)
    under = tuple(f"{n}." for n in experts)
    return {n: s for n, s in tensors.items() if not (n in experts or n.startswith(under))} | experts


def _rule(rules: Mapping[str, str], parameter: str) -> str | None:
    """Return the style of a parameter: its own or its module's."""
    from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

    name = replace_layer_number_by_wildcard(parameter)
    return rules.get(name) or rules.get(name.rpartition(".")[0])


def _drop_rule(model: Any, config: Any, parameter: str, module: nn.Module) -> None:
    """Drop the rule of a float parameter that a module of codes lacks; transformers would warn of it."""
    from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

    name = replace_layer_number_by_wildcard(parameter)
    if parameter.rpartition(".")[2] in module._parameters:
        return
    for plan, given in ((model.tp_plan, config.tp_plan), (model.ep_plan, config.ep_plan)):
        if not (isinstance(given, dict) and name in given):  # transformers requires that a given rule is known
            (plan or {}).pop(name, None)


def _spans(style: str, module: Coded, shape: tuple[int, ...], mesh: Any) -> tuple[tuple[Span, ...], ...] | None:
    """Return which rows and columns, and experts, a style gives this rank; None if all of them."""
    from torch.distributed.tensor import DTensor
    from transformers.distributed.sharding_utils import DtensorShardOperation
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    transposed = bool(getattr(module, "is_transposed", False))
    if isinstance(module, PendingLinear) and module.transposed:
        raise ValueError("a Conv1D, whose weight is transposed, is not supported")
    swapped = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    probe = nn.Module()
    if hasattr(module, "num_experts"):
        probe.num_experts = module.num_experts
    probe.register_parameter("weight", nn.Parameter(torch.empty(swapped, device="meta"), requires_grad=False))
    ALL_PARALLEL_STYLES[style].shard_param(probe, "weight", mesh)
    for told in ("num_experts", "_is_expert_parallel"):  # a style for whole experts sets them
        if told in probe.__dict__:
            module.__dict__[told] = probe.__dict__[told]
    weight = probe.weight
    if not isinstance(weight, DTensor):
        return None
    placement = weight.placements[0]
    if not hasattr(placement, "dim"):
        return None
    dim = placement.dim % len(shape)
    numbers = torch.arange(swapped[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
    spans: list[tuple[Span, ...]] = [((0, size),) for size in swapped]
    own = DtensorShardOperation(weight).shard_tensor(numbers)
    assert own is not None
    spans[dim] = _runs(own.flatten().tolist())
    if transposed:
        spans[-2:] = spans[-1], spans[-2]
    return tuple(spans)


def _runs(numbers: list[int]) -> tuple[Span, ...]:
    """Return consecutive numbers as spans."""
    runs: list[Span] = []
    for n in numbers:
        if runs and runs[-1][1] == n:
            runs[-1] = runs[-1][0], n + 1
        else:
            runs.append((n, n + 1))
    return tuple(runs)


def _check_heads(model: Any, rules: Mapping[str, str], ranks: int) -> None:
    """Raise a ValueError if ranks would divide attention heads, which fails in transformers' attention."""
    for attention, owner in model.named_modules():
        size = getattr(owner, "head_dim", None)
        for projection in ("q_proj", "k_proj", "v_proj"):
            module, name = owner._modules.get(projection), f"{attention}.{projection}"
            if not isinstance(size, int) or not isinstance(module, nn.Linear):
                continue
            rows = module.out_features
            if _rule(rules, f"{name}.weight") == "colwise" and rows % size == 0 and rows // size % ranks:
                raise ValueError(
                    f"tensor parallel: {name} has {rows // size} heads of {size}, which {ranks} ranks do not divide; "
                    "transformers' attention would fail with \"shape '[..., -1, "
                    f"{size}]' is invalid\". Use a number of ranks that divides the heads, or a plan that gathers "
                    'them: "colwise_gather_output" for q_proj, k_proj and v_proj, and "rowwise_split_input" for o_proj'
                )


# -- modules --------------------------------------------------------------------------------------


def _adapt_forward(name: str, module: Coded) -> None:
    """Make forward accept what transformers passes to a rank; transformers wraps the result in its turn."""
    parts = parts_of(module)
    if isinstance(module, QINSExperts):
        padding = {stack: part.padding for stack, part in parts.items()}
        if any(map(any, padding.values())):
            module.__dict__["_project"] = _padding_inputs_of(module._project, padding)
    elif isinstance(module, QINSEmbedding):
        if module._parameters.get("bias") is not None:
            raise ValueError(f"tensor parallel: {name}: an embedding with a bias is not supported")
        module.__dict__["forward"] = _looking_up(module.forward, parts[""])
    elif any(parts[""].padding):
        module.__dict__["forward"] = _padding_input(module.forward, parts[""].padding)


def _padding_input(forward: Callable[[Tensor], Tensor], padding: Span) -> Callable[[Tensor], Tensor]:
    def padded(input: Tensor) -> Tensor:
        return forward(nn.functional.pad(input, padding))

    return padded


def _padding_inputs_of(project: Callable[..., Tensor], padding: Mapping[str, Span]) -> Callable[..., Tensor]:
    def padded(stack: str, x: Tensor, experts: Tensor) -> Tensor:
        return project(stack, nn.functional.pad(x, padding.get(stack, (0, 0))), experts)

    return padded


def _looking_up(forward: Callable[[Tensor], Tensor], part: Part) -> Callable[[Tensor], Tensor]:
    """Return the forward of a part of an embedding: zeros for other ranks' rows, and only this rank's columns."""
    (begin, end), *_ = part.spans[0]
    first, last = part.padding
    if (begin, end) == (0, part.shape[0]):
        width = part.own_shape[1] - first - last

        def columns(input: Tensor) -> Tensor:
            return forward(input).narrow(-1, first, width)

        return columns

    def rows(input: Tensor) -> Tensor:
        other = (input < begin) | (input >= end)
        return forward((input - begin).masked_fill(other, 0)).masked_fill(other.unsqueeze(-1), 0)

    return rows


def install(model: Any, name: str, module: QINSLinear | QINSEmbedding) -> None:
    """Apply the plan to a module that replaces another one after loading."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    config = model.config.distributed_config
    mesh = model._mesh_manager.get_mesh("tp" if (config.tp_size or 1) > 1 else "ep")
    rules = _rules(model, config)
    note_parts(name, module, rules, mesh)
    if style := _rule(rules, f"{name}.weight"):
        ALL_PARALLEL_STYLES[style].install_forward(module, mesh)


def exchange_directly(model: Any) -> None:
    """Let layers that gather outputs or split inputs call torch.distributed themselves when no gradient is needed.

    transformers does it with DTensors, which for the few numbers of a token take several times longer.
    """
    config = model.config.distributed_config
    if (config.tp_size or 1) == 1:
        return
    group = model._mesh_manager.get_mesh("tp").get_group()
    rules = _rules(model, config)
    for name, module in coded_modules(model):
        part = parts_of(module).get("")
        if not isinstance(module, QINSLinear) or part is None or module._parameters["bias"] is not None:
            continue
        style = _rule(rules, f"{name}.weight")
        own: Callable[[Tensor], Tensor] = MethodType(type(module).forward, module)
        if style in ("colwise_gather_output", "colwise_rep") and part.shape[0] % config.tp_size == 0:
            module.__dict__["forward"] = _without_gradients(_gathering(own, config.tp_size, group), module.forward)
        elif style in ("rowwise_split_input", "rowwise_rep"):
            module.__dict__["forward"] = _without_gradients(_splitting(own, part, group), module.forward)


def _without_gradients(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(input: Tensor) -> Tensor:
        plain = type(input) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return ours(input) if plain else theirs(input)

    return forward


def _gathering(forward: Callable[[Tensor], Tensor], ranks: int, group: Any) -> Callable[[Tensor], Tensor]:
    # torch 2.13 has renamed it
    gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor

    def gathered(input: Tensor) -> Tensor:
        y = forward(input).contiguous()
        parts = y.new_empty(ranks * y.numel())
        gather(parts, y.view(-1), group)
        return parts.view(ranks, *y.shape).movedim(0, -2).flatten(-2)

    return gathered


def _splitting(forward: Callable[[Tensor], Tensor], part: Part, group: Any) -> Callable[[Tensor], Tensor]:
    (begin, end), (before, after) = part.spans[-1][0], part.padding

    def summed(input: Tensor) -> Tensor:
        own = input[..., begin + before : end - after]
        y = forward(nn.functional.pad(own, part.padding) if before or after else own)
        torch.distributed.all_reduce(y, group=group)
        return y

    return summed


def keep_parts(model: nn.Module) -> None:
    """Cut the codes that are still whole; modules that share codes share the part, too."""
    shared: dict[tuple[int, Part], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    uses = Counter(id(next(iter(m._buffers.values()))) for _, m in coded_modules(model))
    for _, module in coded_modules(model):
        for stack, part in parts_of(module).items():
            fields = {f: module.get_buffer(buffer_name(stack, f)) for f in part.own_layout}
            if all(fields[f].shape == shape for f, (shape, _) in part.own_layout.items()):
                continue
            number = id(next(iter(fields.values())))
            _, own = shared.get((number, part)) or (fields, part.cut(fields))
            if uses[number] > 1:
                shared[number, part] = fields, own  # with the whole, so that its id stays its own
            for t in fields.values():
                let_go(t)
            narrow(module, stack)
            module._buffers.update({buffer_name(stack, f): t for f, t in own.items()})


# -- whole tensors --------------------------------------------------------------------------------


def whole_tensor(t: Tensor) -> Tensor:
    """Return the whole of a tensor that transformers sharded; every rank must call this."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(t, DTensor):
        return t
    if t.placements != (Shard(0),):
        return t.full_tensor()
    own = t.to_local().detach()
    whole = torch.empty(t.shape, dtype=t.dtype)
    group = t.device_mesh.get_group()
    for rank, rows in enumerate(whole.chunk(t.device_mesh.size())):  # in place, unlike full_tensor: half the memory
        if rank == t.device_mesh.get_local_rank():
            rows.copy_(own)
        torch.distributed.broadcast(rows, torch.distributed.get_global_rank(group, rank), group)
    return whole


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """Return the state of the whole model on the first rank, and None on the others; every rank must call this."""
    from torch.distributed.tensor import DTensor

    state: dict[str, Tensor] = model.state_dict()
    first = torch.distributed.get_rank() == 0
    wholes: dict[int, Tensor] = {}  # by address: tied weights stay one tensor
    for name, t in state.items():
        if isinstance(t, DTensor):
            address = t.to_local().data_ptr()
            if address not in wholes:
                whole = whole_tensor(t.detach())
                wholes[address] = whole if first else torch.empty(0)
            state[name] = wholes[address]
    for name, module in coded_modules(model):
        for stack, part in parts_of(module).items():
            at = {f: f"{name}.{buffer_name(stack, f)}" for f in part.own_layout}
            if all(key in state for key in at.values()):  # others share another module's codes
                joined = _joined(part, {f: state[key] for f, key in at.items()})
                state.update({at[f]: t for f, t in joined.items()})
    return state if first else None


def _joined(part: Part, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a matrix's whole fields on the first rank, from the parts of all ranks; nothing on the others."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts: list[Any] | None = [None] * ranks if rank == 0 else None
    torch.distributed.gather_object(part, parts)
    if parts is None:
        for t in own.values():
            torch.distributed.send(t.contiguous(), 0)
        return {}
    layout = field_layout(part.codec, part.shape, part.group_size)
    whole = {f: torch.empty(shape, dtype=dtype) for f, (shape, dtype) in layout.items()}
    part.join(whole, own)
    for other in range(1, ranks):
        for f, (shape, dtype) in parts[other].own_layout.items():
            t = torch.empty(shape, dtype=dtype)
            torch.distributed.recv(t, other)
            parts[other].join({f: whole[f]}, {f: t})
    return whole
