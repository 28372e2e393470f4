"""Calibration: a model's own activations determine the codes of its weights.

Statistics of the layers' inputs are collected in rounds, with as many layers per round as fit in memory. Each layer is
then rounded with error feedback (codec/feedback.py). Its codes are kept if they do better than the nearest codes on
held-out tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..codec import DAMPING, LOG_BITS, fallback_note, format_of, resolve_group_size, warn_if_slow
from ..nn import (
    ConversionReport,
    ConvertedModule,
    Places,
    QINSEmbedding,
    QINSLinear,
    SkippedModule,
    WeightComparison,
    check_finite,
    choose,
    choose_experts,
    encode_experts,
    keep_hooks,
    places_of,
    sharing_codes,
    tell_others,
)
from ..system import give_back_freed_memory, progress
from .activations import Layer, Text, split
from .choosing import choose_codes
from .rounds import Clock
from .store import Choice

if TYPE_CHECKING:
    from .planning import Plan

Tensor = torch.Tensor


@dataclass(frozen=True)
class CalibratedModule(ConvertedModule):
    """One layer. Errors are squared errors of outputs over squared outputs, on held-out tokens."""

    nearest_error: float
    error: float
    kept: str  # "calibrated", or the reason for keeping the nearest codes


@dataclass
class CalibrationReport(ConversionReport):
    """The result of `calibrate`; prints as a table, like the report of `convert`.

    Attributes:
        tokens: number of tokens for statistics.
        held_out: number of held-out tokens, on which the better codes are chosen.
        seconds_statistics: time of the model's passes.
        seconds_rounding: time of the rest.

    """

    tokens: int = 0
    held_out: int = 0
    seconds_statistics: float = 0.0
    seconds_rounding: float = 0.0

    def __str__(self) -> str:
        kept = [m for m in self.converted if isinstance(m, CalibratedModule)]
        better = sum(m.kept == "calibrated" for m in kept)
        lines = [
            super().__str__(),
            f"calibrated on {self.tokens:,} tokens, {self.held_out:,} held out: {better} of {len(kept)} layers have "
            f"codes chosen by error feedback; {self.seconds_statistics:.0f} s of statistics, "
            f"{self.seconds_rounding:.0f} s of rounding",
        ]
        lines += [f"  {m.name}: {m.kept}" for m in kept if m.kept != "calibrated"]
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | Text,
    *,
    codec: str = "log8",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = ("lm_head",),
    group_size: int | str | None = "default",
    damping: float = DAMPING,
    held_out: float = 0.125,
    sequential: bool = False,
    plan: Plan | None = None,
    room: int = 128 << 20,
    show_progress: bool | None = None,
) -> CalibrationReport:
    """Quantize linear layers in place, to QINSLinear with codes chosen from the model's own activations.

    The model runs over the batches to collect second moments of each layer's inputs, for a few layers at a time if all
    need more memory than `room`. Then each weight is rounded with error feedback (see `qins.ErrorFeedback`). If that
    does not improve a layer's outputs on held-out batches, the layer gets the nearest codes, as from `convert`. So do
    experts that are kept as stacks of matrices. The result depends only on the arguments and the number of threads.

    Args:
        model: any nn.Module whose forward takes a batch; in float, on the CPU.
        batches: tensors of token ids, (batch, length), or mappings of forward's arguments. 8,192 tokens of text that
            resembles what the model will read are enough; `qins.fidelity.windows` cuts it into batches.
        codec: "log8", "log6", "log5" or "log4", as in `convert`.
        include: fnmatch patterns of module names to convert; None for all.
        exclude: patterns of module names to skip.
        group_size: as in `convert`.
        damping: added to the diagonal of the second moments, as a share of its mean. A larger value makes the codes
            depend less on this text.
        held_out: share of the batches to hold out.
        sequential: calibrate the layers of later rounds on the codes of earlier layers, instead of on their floats.
        plan: result of `qins.plan` for the same model. It overrides codec and group_size. Layers that it leaves out
            stay in float.
        room: memory for statistics, in bytes; layers that do not fit wait for another pass over the batches.
        show_progress: None shows a progress bar on a terminal.

    Returns:
        a report that prints as a table.

    Raises:
        ValueError: the batches are too few or too uniform, a weight is NaN or infinite, or the codec cannot be
            calibrated; the model is unchanged.

    """
    if codec not in LOG_BITS:
        raise ValueError(f"codec: expected one of {', '.join(LOG_BITS)} to calibrate, got {codec!r}")
    text = batches if isinstance(batches, Text) else split(batches, held_out)
    resolve_group_size(codec, group_size, 1)
    warn_if_slow(codec, group_size)
    report = CalibrationReport(tokens=text.tokens[0], held_out=text.tokens[1])
    chosen = choose(model, include, exclude, report)
    if plan is not None:
        for module in [m for m, n in chosen.items() if n in plan.left]:
            report.skipped.append(SkippedModule(chosen.pop(module), "Linear", "left by the plan"))
    experts = choose_experts(model, include, exclude, report)
    check_finite(chosen, experts)
    places = places_of(model, chosen)
    first: dict[int, str] = {id(m.weight): n for m, n in reversed(chosen.items())}
    asked: dict[str, tuple[str, int | str | None]] = dict.fromkeys(chosen.values(), (codec, group_size))
    if plan is not None:
        asked |= plan.formats
    layers = {n: Layer(m, *format_of(*asked[n], m.in_features)) for m, n in chosen.items() if first[id(m.weight)] == n}
    comparison, clock = WeightComparison(), Clock()
    ready: dict[str, QINSLinear] = {}

    def install(name: str, choice: Choice) -> None:
        note = fallback_note(asked[name][0], layers[name].weight.shape[1])
        ready[name] = _encoded_layer(name, layers[name], choice, comparison, report, note)
        if sequential:
            _put_in_place(ready[name], layers[name].module, places)

    with progress("calibrating", sum(layer.weight.numel() for layer in layers.values()), show_progress) as advance:
        for _ in choose_codes(
            model,
            layers,
            text,
            damping=damping,
            room=room,
            advance=advance,
            clock=clock,
            install=install,
            sequential=sequential,
        ):
            pass
    for module, name in chosen.items():
        new: QINSLinear | QINSEmbedding = ready[first[id(module.weight)]]
        if first[id(module.weight)] != name:
            new = sharing_codes(name, module, new, report)
        _put_in_place(new, module, places)
    order = {n: i for i, n in enumerate(layers)}
    report.converted.sort(key=lambda m: order[m.name])
    for name, stacked in experts.items():
        model.set_submodule(name, encode_experts(name, stacked, codec, group_size, report))
    report.seconds_statistics, report.seconds_rounding = clock.statistics, clock.rounding
    give_back_freed_memory()
    tell_others(model)
    return report


def _put_in_place(new: nn.Module, old: nn.Module, places: Places) -> None:
    keep_hooks(old, new)
    for parent, key in places[old]:
        parent._modules[key] = new


def _encoded_layer(
    name: str, layer: Layer, choice: Choice, comparison: WeightComparison, report: CalibrationReport, note: str
) -> QINSLinear:
    linear = layer.module
    assert isinstance(linear, nn.Linear)
    new = QINSLinear.from_encoded(linear, choice.encoded, layer.codec, layer.group_size)
    report.converted.append(
        CalibratedModule(
            name, (linear.out_features, linear.in_features), layer.codec, layer.group_size,
            linear.weight.numel() * linear.weight.element_size(), choice.encoded.nbytes,
            comparison.snr_db(linear.weight, choice.encoded), choice.nearest_error, choice.error, choice.kept,
            note=note,
        )
    )  # fmt: skip
    return new
