"""Calibration: a model's own activations decide which log8 codes its weights get.

The layers' inputs are looked at in rounds, as many layers a round as their statistics have room for; then each layer is
rounded with error feedback (feedback.py), and the codes are kept if they do better than the nearest ones on tokens that
the rounding has not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..codec import DAMPING, resolve_group_size, warn_if_slow
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
    """One layer. Errors are squared errors of outputs over squared outputs, on tokens held out of the rounding."""

    nearest_error: float
    error: float
    kept: str  # "calibrated", or why the codes are the nearest ones


@dataclass
class CalibrationReport(ConversionReport):
    """What `calibrate` did; printing it gives the table of `convert`.

    Attributes:
        tokens: how many were used for statistics, and held_out: how many for the choice.
        seconds_statistics: time of the model's passes, and seconds_rounding: of all the rest.

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
    """Replace linear layers by QINSLinear with log8 codes that are chosen by the model's own activations; in place.

    The model runs over the batches while the second moments of each layer's inputs are added up, a few layers at a
    time if they need more than `room`; then each weight is rounded with error feedback (see `qins.ErrorFeedback`). A
    layer whose outputs would be no better for it, on batches held out of the statistics, gets the nearest codes, as
    from `convert`. So do experts that are kept as stacks of matrices. The result does not depend on anything but the
    arguments and the number of threads.

    Args:
        model: any nn.Module whose forward takes a batch; in float, on the CPU.
        batches: tensors of token ids, (batch, length), or mappings of forward's arguments. 8,192 tokens of text like
            what the model will read are enough; `qins.fidelity.windows` cuts them.
        include: fnmatch patterns of module names to encode; None for all.
        exclude: patterns of module names to leave alone.
        group_size: as in `convert`.
        damping: what is added to the second moments' diagonal, as a share of its mean. More makes the codes depend
            less on this text.
        held_out: share of the batches that is held out.
        sequential: let layers that are calibrated in a later round see the codes of those before, instead of floats.
        plan: what `qins.plan` made of the same model: group_size is not used then, and layers that it leaves are left.
        room: bytes that the statistics may take; what does not fit waits for another pass over the batches.
        show_progress: None shows a progress bar on a terminal.

    Raises:
        ValueError: the batches are too few or too uniform, or a weight is NaN or infinite; the model is unchanged.

    """
    text = batches if isinstance(batches, Text) else split(batches, held_out)
    resolve_group_size("log8", group_size, 1)
    warn_if_slow("log8", group_size)
    report = CalibrationReport(tokens=text.tokens[0], held_out=text.tokens[1])
    chosen = choose(model, include, exclude, report)
    if plan is not None:
        for module in [m for m, n in chosen.items() if n in plan.left]:
            report.skipped.append(SkippedModule(chosen.pop(module), "Linear", "left by the plan"))
    experts = choose_experts(model, include, exclude, report)
    check_finite(chosen, experts)
    places = places_of(model, chosen)
    first: dict[int, str] = {id(m.weight): n for m, n in reversed(chosen.items())}
    planned = plan.group_sizes if plan is not None else {}
    layers = {
        n: Layer(m, "log8", resolve_group_size("log8", planned.get(n, group_size), m.in_features))
        for m, n in chosen.items()
        if first[id(m.weight)] == n
    }
    comparison, clock = WeightComparison(), Clock()
    ready: dict[str, QINSLinear] = {}

    def install(name: str, choice: Choice) -> None:
        ready[name] = _encoded_layer(name, layers[name], choice, comparison, report)
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
        model.set_submodule(name, encode_experts(name, stacked, "log8", group_size, report))
    report.seconds_statistics, report.seconds_rounding = clock.statistics, clock.rounding
    give_back_freed_memory()
    tell_others(model)
    return report


def _put_in_place(new: nn.Module, old: nn.Module, places: Places) -> None:
    keep_hooks(old, new)
    for parent, key in places[old]:
        parent._modules[key] = new


def _encoded_layer(
    name: str, layer: Layer, choice: Choice, comparison: WeightComparison, report: CalibrationReport
) -> QINSLinear:
    linear = layer.module
    assert isinstance(linear, nn.Linear)
    new = QINSLinear.from_encoded(linear, choice.encoded, "log8", layer.group_size)
    report.converted.append(
        CalibratedModule(
            name, (linear.out_features, linear.in_features), "log8", layer.group_size,
            linear.weight.numel() * linear.weight.element_size(), choice.encoded.nbytes,
            comparison.snr_db(linear.weight, choice.encoded), choice.nearest_error, choice.error, choice.kept,
        )
    )  # fmt: skip
    return new
