"""Calibration: a model's own activations decide which log8 codes its weights get.

The layers' inputs are looked at in rounds, as many layers a round as their statistics have room for; then each layer is
rounded with error feedback (feedback.py), and the codes are kept if they do better than the nearest ones on tokens that
the rounding has not seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ._atomic import atomically, write_json
from ._pages import give_back_freed_memory, page_out
from .activations import Layer, Statistics, Text, evaluating, forward_call, paged_out, split
from .array import EncodedArray, encode
from .blocks import BlockChain
from .coded import resolve_group_size, warn_if_slow
from .conversion import (
    ConversionReport,
    ConvertedModule,
    Places,
    SkippedModule,
    WeightComparison,
    check_finite,
    choose,
    choose_experts,
    encode_experts,
    keep_hooks,
    places_of,
    progress,
    sharing_codes,
    tell_transformers,
)
from .feedback import DAMPING, ErrorFeedback
from .linear import QINSEmbedding, QINSLinear

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


def output_errors(x: Tensor, weight: Tensor, e: EncodedArray | None) -> Tensor:
    """Mean square, over tokens x, of what the codes change each output by, float64 (N,).

    Without codes it is the mean square of the outputs themselves, as if the codes were zeros.
    """
    errors = torch.empty(weight.shape[0], dtype=torch.float64)
    rows = max(1, (1 << 22) // max(weight.shape[1], 1))
    decoded = torch.zeros(min(rows, weight.shape[0]), weight.shape[1])
    for row in range(0, weight.shape[0], rows):
        w = weight[row : row + rows].float()
        part = decoded[: len(w)]
        if e is not None:
            e.decode_block(part.numpy(), "float32", row, 0)
        errors[row : row + rows] = (x @ (part - w).T).square().mean(0, dtype=torch.float64)
    return errors


@dataclass
class Choice:
    """The codes of one layer, and how they came about."""

    encoded: EncodedArray
    nearest_error: float = float("nan")
    error: float = float("nan")
    kept: str = "calibrated"


def _choose_codes(layer: Layer, feedback: ErrorFeedback | None, held: Tensor | None) -> Choice:
    weight = layer.weight
    if feedback is None:
        nearest = encode(weight, "log8", group_size=layer.group_size)
        return Choice(nearest, kept="nearest: the calibration text does not reach it")
    calibrated = feedback.encode(weight, group_size=layer.group_size)
    if held is None or not len(held):
        return Choice(calibrated)
    nearest = encode(weight, "log8", group_size=layer.group_size)
    size, before, after = (float(output_errors(held, weight, e).sum()) for e in (None, nearest, calibrated))
    if size > 0.0:
        before, after = before / size, after / size
    if after < before:
        return Choice(calibrated, before, after)
    return Choice(nearest, before, before, "nearest: no better on the tokens held out")


class Store:
    """Codes of finished layers on the disk, from which an interrupted calibration goes on."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        about = directory / "about.json"
        directory.mkdir(parents=True, exist_ok=True)
        if about.exists():
            if json.loads(about.read_text("utf-8")).get("fingerprint") != fingerprint:
                raise FileExistsError(
                    f"{directory}: holds an unfinished calibration of another model, on other text or with other "
                    "settings; remove it"
                )
        else:
            write_json(about, {"fingerprint": fingerprint})

    def put(self, name: str, choice: Choice) -> None:
        """Keep a layer's codes."""
        from safetensors.numpy import save_file

        e = choice.encoded
        about = {"codec": e.codec, "group_size": str(e.group_size or 0), "nearest_error": repr(choice.nearest_error),
                 "error": repr(choice.error), "kept": choice.kept}  # fmt: skip
        with atomically(self.directory / f"{name}.safetensors") as temporary:
            save_file({n: np.asarray(f) for n, f in e.fields.items()}, str(temporary), about)

    def has(self, name: str) -> bool:
        """Whether a layer's codes are there."""
        return (self.directory / f"{name}.safetensors").exists()

    def get(self, name: str) -> Choice | None:
        """Return a layer's codes, if they are there."""
        from safetensors import safe_open

        if not self.has(name):
            return None
        with safe_open(str(self.directory / f"{name}.safetensors"), "np") as f:
            about = f.metadata()
            fields = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - not a dict
        e = EncodedArray.from_fields(about["codec"], fields, int(about["group_size"]) or None)
        return Choice(e, float(about["nearest_error"]), float(about["error"]), about["kept"])


@dataclass
class Clock:
    """Seconds by kind of work."""

    statistics: float = 0.0
    rounding: float = 0.0


def choose_codes(
    model: nn.Module,
    layers: Mapping[str, Layer],
    text: Text,
    *,
    damping: float = DAMPING,
    room: int = 128 << 20,
    mapped: bool = False,
    store: Store | None = None,
    advance: Callable[[int], None] = lambda _: None,
    clock: Clock | None = None,
    install: Callable[[str, Choice], None] | None = None,
    sequential: bool = False,
) -> Iterator[tuple[str, Choice]]:
    """Yield each layer's name and codes.

    Args:
        model: a float model.
        layers: those to encode, by name.
        text: what `split` returned.
        damping: as `ErrorFeedback`'s.
        room: bytes that statistics may take at a time; one layer is looked at even if it takes more.
        mapped: weights lie in mapped files and may leave memory after use.
        store: where finished layers are kept, and taken from.
        advance: told the weights of each finished layer.
        clock: adds up the time.
        install: is given each layer's codes as soon as they are there.
        sequential: install changes the model before the next round.

    """
    clock = clock or Clock()
    begin, before = time.perf_counter(), clock.statistics
    left = dict(layers)

    def finish(name: str, choice: Choice) -> tuple[str, Choice]:
        if install:
            install(name, choice)
        advance(layers[name].weight.numel())
        return name, choice

    for name, layer in layers.items():
        done = store.get(name) if store else None
        if done is None and layer.codec != "log8":
            done = Choice(encode(layer.weight, layer.codec), kept=f"{layer.codec} has one code a value")
            if store:
                store.put(name, done)
        if done is not None:
            del left[name]
            yield finish(name, done)
    for name, feedback, held in rounds(model, left, text, damping, room, mapped, clock, sequential):
        try:
            choice = _choose_codes(layers[name], feedback, held)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        if store:
            store.put(name, choice)
        yield finish(name, choice)
        if mapped:
            page_out(layers[name].parameter)
    clock.rounding += time.perf_counter() - begin - (clock.statistics - before)


def rounds(
    model: nn.Module,
    layers: Mapping[str, Layer],
    text: Text,
    damping: float,
    room: int,
    mapped: bool,
    clock: Clock,
    sequential: bool = False,
) -> Iterator[tuple[str, ErrorFeedback | None, Tensor | None]]:
    """Yield every layer's name, ErrorFeedback of its inputs, and those on the tokens held out, (tokens, in_features).

    The model runs over the text as often as the statistics' room asks for; blocks that are done are passed over where
    that makes no difference (see `BlockChain`). A layer that the text does not reach has neither.
    """
    left = dict(layers)
    chain = BlockChain(model, [layer.module for layer in layers.values()], first=sequential)
    batches = [*text.batches, *text.held]
    checked = False
    while left:
        begin = time.perf_counter()
        statistics = Statistics(left, room, chain.mark, in_order=checked and chain.usable)
        try:
            with evaluating(model), paged_out(layers.values(), mapped), chain.watched():
                for i, batch in enumerate(batches):
                    statistics.collect_held = i >= len(text.batches)
                    forward = forward_call(model, batch)
                    statistics.run(partial(chain.run, i, forward, whole=not checked))
                    if i == 0 and not checked and chain.skips(len(batches) - 1):
                        checked = True
                        _check_chain(chain, statistics, forward_call(model, batches[-1]), len(batches) - 1)
        finally:
            statistics.remove()
        clock.statistics += time.perf_counter() - begin
        for source in list(statistics.gram):
            try:
                feedback = ErrorFeedback(statistics.gram.pop(source).numpy(), damping)
            except ValueError as e:
                raise ValueError(f"{source}: {e}") from None
            held = statistics.held.pop(source)
            for name in [n for n in left if statistics.source.get(n) == source]:
                del left[name]
                yield name, feedback, torch.cat(held) if held else None
        if not statistics.source:  # none of those that are left ever runs
            for name in left:
                yield name, None, None
            return


def _check_chain(chain: BlockChain, statistics: Statistics, forward: Callable[[], Any], batch: int) -> None:
    """See whether a pass over some blocks only gives the layers that are looked at what a whole pass does."""
    whole, part = (
        statistics.probe(partial(chain.run, batch, forward, whole=whole, keep=False)) for whole in (True, False)
    )
    if whole is None or part is None or not torch.equal(whole, part):
        chain.forget()


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
            what the model will read are enough; `qins.evaluate.windows` cuts them.
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
    tell_transformers(model)
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
