"""Mixed precision: choosing each layer's codec and group size to meet a target for bits or for error.

The cost of a layer's error is estimated to second order. KL(float || quantized) of a prediction is about half the sum
over outputs of F dy^2, where dy is the error of an output and F its Fisher information: the mean squared gradient of
log p(token), for tokens sampled from the float model. Off-diagonal terms between outputs, tokens and layers are
neglected.

An encoder predicts nothing. 1 - cosine of a last hidden state h is about half the sum of F dy^2, too, where F is the
mean squared gradient of u . h / |h|, for u with independent standard normal elements: E[(u . a)^2] = |a|^2, and h / |h|
changes by the angle alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from ..codec import DAMPING, LOG_BITS, ErrorFeedback, fallback_note, is_packed
from ..nn import check_finite, choose
from ..system import progress
from .activations import Layer, Text, evaluating, forward_call, split
from .choosing import output_errors
from .rounds import Clock, rounds

Tensor = torch.Tensor

# The sizes with fast kernels.
GROUP_SIZES = (32, 64, 128, 192, 256)
_PACKED_GROUP_SIZES = (32, 64)
# Above this target, plans leave out the packed codecs: nearly every layer can have log8, whose errors are far smaller.
_LEAST_BITS_WITHOUT_PACKED = 8.0
_SENSITIVITY_TOKENS = 1024


@dataclass(frozen=True)
class Option:
    """One possible format of a layer.

    Attributes:
        group_size: the codec's group size; None for per-row scales only; -1 to leave the layer in float.
        bits: bits per weight, scales included.
        kld: estimated contribution to the model's mean KL divergence, in nats; for encoders, to 1 - cosine of states.
        codec: "log8", "log6", "log5" or "log4".

    """

    group_size: int | None
    bits: float
    kld: float
    codec: str = "log8"

    def __str__(self) -> str:
        if self.group_size == -1:
            return "float"
        return f"{self.codec}/{self.group_size}" if self.group_size else self.codec


@dataclass
class Plan:
    """The format of each layer; prints as a table by kind of layer.

    Attributes:
        chosen: layer name to option.
        weights: layer name to number of weights.
        measure: what `kld` estimates.

    """

    chosen: dict[str, Option] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    measure: str = "KL divergence"

    @property
    def bits(self) -> float:
        """Mean bits per weight over these layers."""
        total = sum(self.weights[n] * o.bits for n, o in self.chosen.items())
        return total / max(sum(self.weights.values()), 1)

    @property
    def kld(self) -> float:
        """Estimated mean KL divergence from the float model, in nats; for encoders, mean 1 - cosine of states."""
        return sum(o.kld for o in self.chosen.values())

    @property
    def formats(self) -> dict[str, tuple[str, int | None]]:
        """Layer name to codec and group size, for the layers to quantize."""
        return {n: (o.codec, o.group_size) for n, o in self.chosen.items() if o.group_size != -1}

    @property
    def group_sizes(self) -> dict[str, int | None]:
        """Layer name to group size, for the layers to quantize."""
        return {n: o.group_size for n, o in self.chosen.items() if o.group_size != -1}

    @property
    def left(self) -> list[str]:
        """Names of the layers that stay in float."""
        return [n for n, o in self.chosen.items() if o.group_size == -1]

    def __str__(self) -> str:
        kinds: dict[str, dict[str, int]] = {}
        for name, o in self.chosen.items():
            counts = kinds.setdefault(name.rpartition(".")[2], {})
            counts[str(o)] = counts.get(str(o), 0) + 1
        lines = [f"{self.bits:.3f} bits per weight, estimated mean {self.measure} {self.kld:.2e}"]
        for kind, counts in kinds.items():
            lines.append(f"  {kind}: " + ", ".join(f"{n} x {o}" for o, n in sorted(counts.items())))
        return "\n".join(lines)


def _scores(out: Any, generator: torch.Generator) -> tuple[Tensor, str]:
    """Return a random number for each token, by whose gradients errors are weighed, and what they then estimate."""
    if getattr(out, "logits", None) is not None:
        log_p = out.logits.float().log_softmax(-1).flatten(0, -2)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        return log_p.gather(1, drawn), "KL divergence"
    if getattr(out, "last_hidden_state", None) is not None:
        direction = normalize(out.last_hidden_state.float(), dim=-1).flatten(0, -2)
        along = torch.randn(direction.shape, generator=generator)
        return (along * direction).sum(-1), "1 - cosine of states"
    raise ValueError(f"plan: expected a model whose output has logits or last hidden states, got {type(out).__name__}")


def sensitivities(
    model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], seed: int = 0
) -> tuple[dict[str, Tensor], str]:
    """Return the weight F of a squared error of each output of each layer, float64 (N,), and what F estimates."""
    totals: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    tokens, measure = 0, ""

    def hook(name: str) -> Callable[..., Tensor]:
        def look(_: nn.Module, _x: Any, y: Tensor) -> Tensor:
            y = y if y.requires_grad else y.detach().requires_grad_()

            def add(g: Tensor) -> None:
                square = g.detach().reshape(-1, g.shape[-1]).double().square().sum(0)
                totals[name] = totals.get(name, torch.zeros_like(square)) + square

            y.register_hook(add)  # type: ignore[no-untyped-call]
            return y

        return look

    frozen = [p for p in model.parameters() if p.requires_grad]
    hooks = [layer.module.register_forward_hook(hook(n)) for n, layer in layers.items()]
    try:
        for p in frozen:
            p.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for batch in batches:
                out = forward_call(model, batch, every_logit=True)()
                scores, measure = _scores(out, generator)
                scores.sum().backward()  # type: ignore[no-untyped-call]
                tokens += len(scores)
                if tokens >= _SENSITIVITY_TOKENS:
                    break
    finally:
        for h in hooks:
            h.remove()
        for p in frozen:
            p.requires_grad_(True)
    return {n: t / tokens for n, t in totals.items()}, measure


def options(
    layer: Layer,
    feedback: ErrorFeedback,
    held: Tensor,
    sensitivity: Tensor,
    formats: Iterable[tuple[str, int | None]],
) -> list[Option]:
    """Return the options of a layer: each of these codecs and group sizes, and its float weight."""
    weight = layer.weight
    found = [Option(-1, 8.0 * weight.element_size(), 0.0)]
    for codec, size in formats:
        e = feedback.encode(weight, codec, group_size=size)
        bits = 8 * e.nbytes / weight.numel()
        kld = 0.5 * float((sensitivity * output_errors(held, weight, e)).sum())
        found.append(Option(size, bits, kld, codec))
    return found


def candidate_formats(in_features: int, packed: bool) -> list[tuple[str, int | None]]:
    """Return the formats to try on a layer: codecs and group sizes."""
    sizes = [s for s in GROUP_SIZES if in_features % s == 0 and s < in_features]
    found: list[tuple[str, int | None]] = [("log8", None), *(("log8", s) for s in sizes)]
    for codec in LOG_BITS:
        if packed and is_packed(codec) and not fallback_note(codec, in_features):
            found += [(codec, s) for s in _PACKED_GROUP_SIZES if s == 32 or in_features % s == 0]
    return found


def hull(found: Iterable[Option]) -> list[Option]:
    """Return the lower convex hull of the options: by bits, with decreasing gain per bit."""
    best: list[Option] = []
    for o in sorted(found, key=lambda o: (o.bits, o.kld)):
        if best and o.kld >= best[-1].kld:
            continue
        while len(best) > 1 and _gain(best[-2], best[-1]) <= _gain(best[-2], o):
            best.pop()
        best.append(o)
    return best


def _gain(a: Option, b: Option) -> float:
    return (a.kld - b.kld) / (b.bits - a.bits)


def allocate(
    found: Mapping[str, list[Option]],
    weights: Mapping[str, int],
    target_bits: float | None = None,
    target_kld: float | None = None,
) -> Plan:
    """Choose an option for each layer: the least error within target_bits, or the fewest bits within target_kld.

    Raises:
        ValueError: not exactly one target is given, or it cannot be reached.

    """
    if (target_bits is None) == (target_kld is None):
        raise ValueError("plan: expected one of target_bits and target_kld")
    hulls = {n: hull(o) for n, o in found.items()}
    plan = Plan({n: h[0] for n, h in hulls.items()}, dict(weights))
    total = sum(weights.values())
    if target_bits is not None and plan.bits > target_bits:
        raise ValueError(f"target_bits: expected at least {plan.bits:.3f} for these layers, got {target_bits:g}")
    steps = [
        (_gain(a, b) / weights[n], n, b) for n, h in hulls.items() for a, b in pairwise(h)
    ]  # fmt: skip
    bits = plan.bits * total
    for _, name, option in sorted(steps, key=lambda s: (-s[0], s[1], s[2].bits)):
        if target_kld is not None and plan.kld <= target_kld:
            break
        more = (option.bits - plan.chosen[name].bits) * weights[name]
        if target_bits is not None and bits + more > target_bits * total:
            continue  # the step of a smaller layer may still fit
        if target_bits is not None and plan.chosen[name] is not hulls[name][hulls[name].index(option) - 1]:
            continue  # the layer's previous step did not fit
        plan.chosen[name] = option
        bits += more
    if target_kld is not None and plan.kld > target_kld:
        raise ValueError(
            f"target_kld: expected at least {plan.kld:.2e}, the least that these layers allow, got {target_kld:g}"
        )
    return plan


def plan_layers(
    model: nn.Module,
    layers: Mapping[str, Layer],
    text: Text,
    target_bits: float | None = None,
    target_kld: float | None = None,
    *,
    damping: float = DAMPING,
    room: int = 128 << 20,
    mapped: bool = False,
    advance: Callable[[int], None] = lambda _: None,
    clock: Clock | None = None,
) -> Plan:
    """Make a plan for these layers; see `plan`."""
    if not text.held:
        raise ValueError("plan: expected held-out batches, got none")
    packed = target_bits is None or target_bits <= _LEAST_BITS_WITHOUT_PACKED
    weights = {n: layer.weight.numel() for n, layer in layers.items()}
    sensitivity, measure = sensitivities(model, layers, [*text.held, *text.batches])
    found: dict[str, list[Option]] = {}
    for name, feedback, held in rounds(model, layers, text, damping, room, mapped, clock or Clock()):
        layer = layers[name]
        if feedback is None or held is None or name not in sensitivity:
            bits = float(LOG_BITS[layer.codec])
            found[name] = [Option(layer.group_size, bits, 0.0, layer.codec)]  # the text does not reach this layer
        else:
            formats = candidate_formats(layer.weight.shape[1], packed)
            found[name] = options(layer, feedback, held, sensitivity[name], formats)
        advance(weights[name])
    made = allocate({n: found[n] for n in layers}, weights, target_bits, target_kld)
    made.measure = measure
    return made


def plan(
    model: nn.Module,
    batches: Iterable[Any] | Text,
    *,
    target_bits: float | None = None,
    target_kld: float | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = ("lm_head",),
    damping: float = DAMPING,
    room: int = 128 << 20,
    show_progress: bool | None = None,
) -> Plan:
    """Choose each layer's codec and group size, so that bits go where they matter most. Pass it to `calibrate`.

    Each layer is rounded to log8 with every fast group size. Unless target_bits is above 8, it is also rounded to log6,
    log5 and log4 in groups of 32 and 64. The cost of its output errors on held-out tokens is estimated from gradients
    of the model's predictions, or of an encoder's last hidden states. A layer may also stay in float.

    Args:
        model: a float model on the CPU, whose output has logits or last hidden states.
        batches: as in `calibrate`.
        target_bits: largest mean bits per weight over these layers, scales included.
        target_kld: largest estimated mean KL divergence, in nats; for encoders, mean 1 - cosine of their states. It is
            only an estimate: measure with `qins eval`.
        include: fnmatch patterns of module names; None for all linear layers.
        exclude: patterns of module names to leave out of the plan.
        damping: as in `calibrate`.
        room: as in `calibrate`.
        show_progress: None shows a progress bar on a terminal.

    Returns:
        the plan, for `calibrate(..., plan=...)`.

    Raises:
        ValueError: not exactly one target is given, or it cannot be reached; or as in `calibrate`.

    """
    if (target_bits is None) == (target_kld is None):
        raise ValueError("plan: expected one of target_bits and target_kld")
    text = batches if isinstance(batches, Text) else split(batches)
    chosen = choose(model, include, exclude)
    check_finite(chosen)
    layers = {n: Layer(m, "log8", None) for m, n in chosen.items()}
    with progress("planning", sum(m.weight.numel() for m in chosen), show_progress) as advance:
        return plan_layers(model, layers, text, target_bits, target_kld, damping=damping, room=room, advance=advance)
