"""The compressed-tensors format, which llm-compressor writes and vLLM reads: FP8, int8 and packed integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..system import naming_extras
from .reading import Checkpoint, StoredTensor
from .scaled import ScaledWeight, check_scales, is_block, matrix_shape

# A module's tensors besides its weight. They are not weights; scales of activations and caches are ignored.
_PARTS = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale", "input_zero_point",
          "output_scale", "output_zero_point")  # fmt: skip
_CACHE = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")
_KINDS = {("float", 8): "FP8", ("int", 8): "int8", ("int", 4): "int4", ("int", 2): "int2"}
_DTYPES = {("float", 8): "float8_e4m3fn", ("int", 8): "int8"}


def read(checkpoint: Checkpoint, told: Mapping[str, Any]) -> tuple[dict[str, ScaledWeight], set[str], str]:
    """Return how each weight is stored, the keys that are not weights of the model, and the format's name for reports.

    Raises:
        ValueError: a weight is in an unsupported format, or its scales are missing or of the wrong shape.

    """
    groups = _groups(told)
    shapes = {n: t for n, t in checkpoint.load_each(k for k in checkpoint.tensors if k.endswith(".weight_shape"))}
    weights: dict[str, ScaledWeight] = {}
    other: set[str] = set()
    used: dict[str, None] = {}
    for key, t in checkpoint.tensors.items():
        module, _, last = key.rpartition(".")
        if last not in ("weight", "weight_packed"):
            continue
        packed = last == "weight_packed"
        name = f"{module}.weight"
        other |= {f"{module}.{part}" for part in _PARTS}
        if not packed and t.dtype != "int8" and "float8" not in t.dtype:
            continue
        group = next((g for g in groups if _targets(g, module)), None)
        if group is None:
            raise ValueError(f"{key}: expected a group of config_groups that targets {module}, got none")
        kind, args = group["kind"], group["weights"]
        if not packed and t.dtype != _DTYPES.get(kind):
            raise ValueError(f"{key}: expected {_DTYPES.get(kind, 'weight_packed')}, got {t.dtype}")
        if packed and kind[0] != "int":
            raise ValueError(f"{key}: expected a group of integers, got {_KINDS[kind]}")
        if f"{module}.weight_g_idx" in checkpoint.tensors:
            raise ValueError(
                f"{module}.weight_g_idx: expected groups in the order of the columns, got an order of its own"
            )
        shape = _packed_shape(t, shapes.get(f"{module}.weight_shape"), kind[1]) if packed else matrix_shape(t)
        zeros = f"{module}.weight_zero_point"
        about = ScaledWeight(
            key,
            f"{module}.weight_scale",
            zeros if zeros in checkpoint.tensors else None,
            shape,
            _block(args, shape),
            kind[1] if packed else 0,
            packed_zeros=checkpoint.tensors[zeros].dtype == "int32" if zeros in checkpoint.tensors else False,
        )
        if about.zero_points is None and not args.get("symmetric", True):
            raise ValueError(f"{key}: expected its zero points in {zeros}, got none")
        check_scales(checkpoint, about)
        weights[name] = about
        used[_name(kind, args)] = None
    if told.get("kv_cache_scheme"):
        other |= {k for k in checkpoint.tensors if k.endswith(tuple(f".{c}" for c in _CACHE))}
    return weights, other, f"compressed-tensors {' and '.join(used)}" if used else "compressed-tensors"


def _groups(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the config groups with quantized weights; targets that name modules precede targets that name a class."""
    for part in ("transform_config", "sparsity_config"):
        if not isinstance(told.get(part) or {}, dict):
            raise ValueError(f"{part}: expected an object, got {told[part]!r}")
    if (told.get("transform_config") or {}).get("config_groups"):
        raise ValueError("transform_config: expected no transforms of weights and activations, got transforms")
    sparse = (told.get("sparsity_config") or {}).get("format")
    if sparse not in (None, "dense"):
        raise ValueError(f"sparsity_config: expected dense weights, got format {sparse!r}")
    stated = told.get("config_groups")
    if not isinstance(stated, dict) or not all(isinstance(g, dict) for g in stated.values()):
        raise ValueError(f"config_groups: expected an object of objects, got {stated!r}")
    groups = []
    for name, group in stated.items():
        args, targets = group.get("weights"), group.get("targets")
        if args is None:
            continue
        where = f"config_groups.{name}"
        if not isinstance(args, dict):
            raise ValueError(f"{where}.weights: expected an object, got {args!r}")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise ValueError(f"{where}.targets: expected names, got {targets!r}")
        bits = args.get("num_bits", 8)
        kind = str(args.get("type", "int")).lower(), bits if type(bits) is int else 0
        form = group.get("format") or told.get("format")
        known = form in (None, "dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized",
                         "mixed-precision")  # fmt: skip
        if kind not in _KINDS or not known:
            raise ValueError(
                f"{where}: expected 8 bits of type float or 2, 4 or 8 bits of type int, got {bits!r} of type "
                f"{kind[0]} in format {form!r}"
            )
        for target in targets:
            _matches(target, "", f"{where}.targets")
        groups.append({"kind": kind, "weights": args, "targets": targets})
    by_name = [g | {"targets": [t for t in g["targets"] if not _is_class(t)]} for g in groups]
    return by_name + [g | {"targets": [t for t in g["targets"] if _is_class(t)]} for g in groups]


def _is_class(target: str) -> bool:
    return target.isidentifier() and target[:1].isupper()


def _targets(group: Mapping[str, Any], module: str) -> bool:
    kind = "Embedding" if "embed" in module.rpartition(".")[2] else "Linear"
    return any(t == kind if _is_class(t) else _matches(t, module, "targets") for t in group["targets"])


_MOST_SECONDS = 1.0  # for a pattern and a name: a pattern may take time that is exponential in the name's length


def _matches(target: str, module: str, where: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    with naming_extras():
        import regex  # which transformers needs too; unlike re, it can give up
    try:
        return regex.match(target[3:], module, timeout=_MOST_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"{where}: expected a pattern that needs less than {_MOST_SECONDS:g} s, got {target!r}"
        ) from None
    except (regex.error, ValueError, OverflowError, RecursionError) as e:
        raise ValueError(f"{where}: expected a regular expression after re:, got {target!r}: {e}") from None


def _packed_shape(t: StoredTensor, stored: Any, bits: int) -> tuple[int, int]:
    rows, words = matrix_shape(t)
    where = f"{t.name.removesuffix('packed')}shape"
    if stored is None:
        raise ValueError(f"{t.name}: expected its shape in {where}, got none")
    shape = [int(n) for n in stored.reshape(-1)[:3]] if not stored.is_floating_point() else []
    if t.dtype != "int32" or len(shape) != 2 or shape[0] != rows or shape[1] < 1 or -(-shape[1] * bits // 32) != words:
        raise ValueError(
            f"{t.name}: expected int32 of {bits} bits per weight and the shape in {where}, got {t.dtype} of shape "
            f"{t.shape} for {shape or stored}"
        )
    return rows, shape[1]


def _strategy(args: Mapping[str, Any]) -> Any:
    """Return what shares a scale; where the config omits the strategy, infer it as the library does."""
    size = args.get("group_size")
    return args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")


def _block(args: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    rows, columns = shape
    strategy, size = _strategy(args), args.get("group_size")
    if strategy == "block":
        block: Any = args.get("block_structure")
        if not is_block(block):
            raise ValueError(f"block_structure: expected two positive numbers, got {block!r}")
        return block[0], block[1]
    if strategy == "group":
        if type(size) is int and size > 0:
            return 1, size
        raise ValueError(f"group_size: expected a positive number, got {size!r}")
    if strategy not in ("tensor", "channel"):
        raise ValueError(f"strategy: expected tensor, channel, group or block, got {strategy!r}")
    return (1 if strategy == "channel" else rows), columns


def _name(kind: tuple[str, int], args: Mapping[str, Any]) -> str:
    """Return the name of a group for reports; config.json keeps it, so the wording stays."""
    shared = {"tensor": "a scale a tensor", "channel": "a scale a row", "block": "scales of blocks",
              "group": f"groups of {args.get('group_size')}"}[_strategy(args)]  # fmt: skip
    return f"{_KINDS[kind]} ({shared}{'' if args.get('symmetric', True) else ', with zero points'})"
