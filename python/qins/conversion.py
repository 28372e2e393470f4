"""Replacing a model's linear layers by QINSLinear, and embeddings by QINSEmbedding."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from ._affine import affine
from ._pages import give_back_freed_memory
from .array import EncodedArray, encode
from .coded import resolve_group_size, warn_if_slow
from .experts import QINSExperts, projections, stack_sizes
from .linear import QINSEmbedding, QINSLinear


@dataclass(frozen=True)
class ConvertedModule:
    """One converted layer. Bytes are of the weight alone; the bias is the same before and after."""

    name: str
    shape: tuple[int, ...]  # of a stack of experts with their number first
    codec: str
    group_size: int | None
    bytes_before: int
    bytes_after: int
    snr_db: float  # 10 log10 of squared weights over squared errors; infinite if exact, nan on the meta device


@dataclass(frozen=True)
class SkippedModule:
    """A module that holds a matrix and was left as it was."""

    name: str
    kind: str
    reason: str


@dataclass
class ConversionReport:
    """What `convert` did; printing it gives a table."""

    converted: list[ConvertedModule] = field(default_factory=list)
    skipped: list[SkippedModule] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """Bytes of the converted weights before."""
        return sum(m.bytes_before for m in self.converted)

    @property
    def bytes_after(self) -> int:
        """Bytes of their codes."""
        return sum(m.bytes_after for m in self.converted)

    @property
    def compression(self) -> float:
        """Bytes before over bytes after, of the converted weights."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "compression": self.compression,
            "converted": [vars(m) | {"shape": list(m.shape)} for m in self.converted],
            "skipped": [vars(m) for m in self.skipped],
        }

    def __str__(self) -> str:
        rows = [("module", "shape", "codec", "bytes before", "bytes after", "SNR dB")]
        for m in self.converted:
            codec = f"{m.codec}/{m.group_size}" if m.group_size else m.codec
            rows.append(
                (m.name, "x".join(map(str, m.shape)), codec, f"{m.bytes_before:,}", f"{m.bytes_after:,}",
                 f"{m.snr_db:.2f}")
            )  # fmt: skip
        rows.append(
            ("total", f"{len(self.converted)} modules", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}",
             f"{self.compression:.2f}x")
        )  # fmt: skip
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.insert(-1, lines[1])
        if self.skipped:
            lines.append("left as they were:")
            lines += [f"  {s.name} ({s.kind}): {s.reason}" for s in self.skipped]
        return "\n".join(line.rstrip() for line in lines)


def snr_db(signal: float, noise: float) -> float:
    """10 log10 of two sums of squares: infinite without noise."""
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf


class WeightComparison:
    """Compares weights with their codes, a few rows at a time.

    The working memory is made once: pieces of it made and freed between codes that stay would leave
    the heap in fragments many times the size of the codes.
    """

    def __init__(self, elements: int = 1 << 20) -> None:
        self._floats, self._decoded = torch.empty(elements), torch.empty(elements)

    def snr_db(self, weight: torch.Tensor, e: EncodedArray) -> float:
        """Signal to noise ratio of the codes of a matrix: infinite if they are exact."""
        return snr_db(*self._squares(weight, e))

    def stack_snr_db(self, weights: torch.Tensor, encoded: Callable[[int], EncodedArray]) -> float:
        """Signal to noise ratio of a stack of matrices, from the codes of each."""
        squares = [self._squares(w, encoded(i)) for i, w in enumerate(weights)]
        return snr_db(sum(s for s, _ in squares), sum(n for _, n in squares))

    def _squares(self, weight: torch.Tensor, e: EncodedArray) -> tuple[float, float]:
        """Sums of squares of a matrix and of its codes' errors."""
        weight = weight.detach()
        signal = noise = 0.0
        elements = self._floats.numel()
        width = max(1, min(weight.shape[1], elements))
        height = max(1, elements // width)
        for row in range(0, weight.shape[0], height):
            for col in range(0, weight.shape[1], width):
                part = weight[row : row + height, col : col + width]
                floats, decoded = (t[: part.numel()] for t in (self._floats, self._decoded))
                floats.view(part.shape).copy_(part)
                e.decode_block(decoded.view(part.shape).numpy(), "float32", row, col)
                decoded.sub_(floats)
                signal += float(floats.dot(floats))
                noise += float(decoded.dot(decoded))
        return signal, noise


def _patterns(argument: str, patterns: str | Iterable[str] | None) -> list[str]:
    listed = [patterns] if isinstance(patterns, str) else list(patterns or [])
    if not all(isinstance(p, str) for p in listed):
        raise TypeError(f"{argument}: expected patterns (strings), got {patterns!r}")
    return listed


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


@contextmanager
def progress(
    description: str, total: int, show: bool | None, *, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """Lend a function that advances a bar by n steps; without a terminal, or rich, it does nothing."""
    if show is None:
        show = sys.stderr.isatty()
    if show:
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
        except ImportError:
            show = False
    if not show:
        yield lambda n: None
        return
    amount = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (TaskProgressColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


def _not_asked_for(name: str, include: list[str], exclude: list[str]) -> str | None:
    if _matches(name, exclude):
        return "excluded"
    if include and not _matches(name, include):
        return "not included"
    return None


def _reason_to_skip(name: str, module: nn.Linear, include: list[str], exclude: list[str]) -> str | None:
    reason = _not_asked_for(name, include, exclude)
    if reason is not None:
        return reason
    if type(module) is not nn.Linear:
        return "a subclass of nn.Linear, which may compute something else"
    if "weight" not in module._parameters:
        return "its weight is not a parameter (something computes it)"
    if not module.weight.dtype.is_floating_point or module.weight.element_size() == 1:
        return f"its weight is {module.weight.dtype}"
    return None


def convert(
    model: nn.Module,
    codec: str = "log8",
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = ("lm_head",),
    group_size: int | str | None = "default",
    embeddings: bool = False,
    show_progress: bool | None = None,
) -> ConversionReport:
    """Replace every module whose class is exactly nn.Linear, at any depth, by a QINSLinear; in place.

    Experts that transformers 5 keeps as stacks of matrices become QINSExperts; embeddings, on request, QINSEmbedding.

    A module that appears in several places is converted once and shared as before, and modules that
    share one weight share its codes. The layers are converted one after the other, and each one's floats
    are given back before the next: the model never takes more memory than it did, but for one layer's codes.

    Args:
        model: any nn.Module that contains linear layers.
        codec: "log8", "log9" or "golden".
        include: fnmatch patterns of module names to convert; None for all.
        exclude: patterns of module names to leave alone.
        group_size: inputs that share a group scale (log8); None for one scale a row; "default" for what
            `qins.default_group_size` says of each layer.
        embeddings: encode embeddings, too: of a model of transformers the input's, of others all.
        show_progress: None shows a progress bar on a terminal (with rich installed).

    Returns:
        a report that prints as a table, and says what was left alone and why.

    Raises:
        ValueError: a weight is NaN or infinite, or a layer that is left alone has the weight of an embedding that is
            not; the message names the module, and the model is unchanged.

    """
    resolve_group_size(codec, group_size, 1)  # raises before anything else is done
    warn_if_slow(codec, group_size)
    report = ConversionReport()
    chosen: dict[Layer, str] = {m: n for m, n in choose(model, include, exclude, report).items()}
    if embeddings:  # first, so that what is tied to them shares their codes
        chosen = choose_embeddings(model, chosen, include, exclude, report) | chosen
    experts = choose_experts(model, include, exclude, report)
    check_finite(chosen, experts)
    _convert(chosen, places_of(model, chosen), codec, group_size, report, show_progress)
    for name, module in experts.items():
        model.set_submodule(name, encode_experts(name, module, codec, group_size, report))
    give_back_freed_memory()
    tell_transformers(model)
    return report


def other_matrices(module: nn.Module) -> str:
    """Why a module that is not a linear layer is left, though its weight is made of matrices; empty for others."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    utils = sys.modules.get("transformers.pytorch_utils")
    if utils is not None and isinstance(module, utils.Conv1D):
        return "a linear layer with its weight transposed, which QinsConfig and qins quantize take"
    return ""


def choose(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = ("lm_head",),
    report: ConversionReport | None = None,
) -> dict[nn.Linear, str]:
    """Return the layers to convert and their names; the report, if there is one, is told of the others."""
    includes, excludes = _patterns("include", include), _patterns("exclude", exclude)
    chosen: dict[nn.Linear, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module, QINSLinear):
            other = other_matrices(module)
            if other and report is not None:
                report.skipped.append(SkippedModule(name, type(module).__name__, other))
            continue
        reason = "the model itself; wrap it" if module is model else _reason_to_skip(name, module, includes, excludes)
        if reason is None:
            chosen[module] = name
        elif report is not None:
            report.skipped.append(SkippedModule(name, type(module).__name__, reason))
    return chosen


def choose_embeddings(
    model: nn.Module,
    chosen: Mapping[Layer, str],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str],
    report: ConversionReport,
) -> dict[Layer, str]:
    """Return the embeddings to convert, and their names, beside the layers that are chosen.

    Raises:
        ValueError: a layer that is not chosen shares the weight of one.

    """
    includes, excludes = _patterns("include", include), _patterns("exclude", exclude)
    given = getattr(model, "get_input_embeddings", None)
    source = given() if callable(given) else None
    found: dict[Layer, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or isinstance(module, QINSEmbedding):
            continue
        if source is not None and module.weight is not source.weight:
            continue
        reason = "the model itself; wrap it" if module is model else _not_asked_for(name, includes, excludes)
        if reason is None and module.max_norm is not None:
            reason = "it has max_norm, which changes weights"
        try:
            affine(module)
        except ValueError as e:
            reason = reason or str(e)
        if reason is None:
            found[module] = name
        else:
            report.skipped.append(SkippedModule(name, type(module).__name__, reason))
    names = {id(m.weight): n for m, n in found.items()}
    for name, module in model.named_modules():
        tied = names.get(id(module._parameters.get("weight")))
        if tied is not None and module not in found and module not in chosen:
            raise ValueError(
                f"embeddings: {name} shares the weight of {tied}, and would keep the floats; convert it, too"
            )
    return found


def choose_experts(
    model: nn.Module, include: str | Iterable[str] | None, exclude: str | Iterable[str], report: ConversionReport
) -> dict[str, nn.Module]:
    """Return the modules of experts to convert, by name; the report is told of the others."""
    includes, excludes = _patterns("include", include), _patterns("exclude", exclude)
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not projections(module) or isinstance(module, QINSExperts):
            continue
        reason = "the model itself; wrap it" if module is model else _not_asked_for(name, includes, excludes)
        if reason is None:
            chosen[name] = module
        else:
            report.skipped.append(SkippedModule(name, type(module).__name__, reason))
    return chosen


def encode_experts(
    name: str, module: nn.Module, codec: str, group_size: int | str | None, report: ConversionReport
) -> QINSExperts:
    """Encode a module of experts.

    Raises:
        ValueError: a weight is NaN or infinite.

    """
    sizes = {s: resolve_group_size(codec, group_size, stack_sizes(module, s)[2]) for s in projections(module)}
    try:
        new = QINSExperts.from_experts(module, codec, sizes)
    except ValueError as e:
        raise ValueError(f"{name}.{e}") from None
    comparison = WeightComparison()
    for stack, shape in new.shapes.items():
        before: torch.Tensor = module._parameters[stack]  # type: ignore[assignment]
        matrices = before.transpose(1, 2) if new.is_transposed else before
        quality = comparison.stack_snr_db(matrices, lambda i, stack=stack: new.encoded(stack, i))  # type: ignore[misc]
        after = sum(f.nbytes for f in new.fields(stack))
        report.converted.append(
            ConvertedModule(f"{name}.{stack}", shape, codec, sizes[stack], before.nbytes, after, quality)
        )
    keep_hooks(module, new)
    return new


Layer = nn.Linear | nn.Embedding
Places = dict[nn.Module, list[tuple[nn.Module, str]]]


def places_of(model: nn.Module, chosen: Iterable[nn.Module]) -> Places:
    """Return where each of the modules hangs: parents and keys."""
    places: Places = {m: [] for m in chosen}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child in places:
                places[child].append((parent, key))
    return places


def _convert(
    chosen: dict[Layer, str],
    places: Places,
    codec: str,
    group_size: int | str | None,
    report: ConversionReport,
    show_progress: bool | None,
) -> None:
    by_weight: dict[int, QINSLinear | QINSEmbedding] = {}
    comparison = WeightComparison()
    with progress(f"encoding to {codec}", sum(m.weight.numel() for m in chosen), show_progress) as advance:
        # each layer's floats go before the next layer's codes are made, so nothing here may keep a reference
        while chosen:
            module = next(iter(chosen))
            name, count, key_of_weight = chosen.pop(module), module.weight.numel(), id(module.weight)
            size = resolve_group_size(codec, group_size, module.weight.shape[1])
            same = by_weight.get(key_of_weight)
            if same is None:
                new = _encode_module(name, module, codec, size, report, comparison)
            else:
                new = sharing_codes(name, module, same, report)
            keep_hooks(module, new)
            if any(m.weight is module.weight for m in chosen):
                by_weight[key_of_weight] = new
            for parent, key in places.pop(module):
                parent._modules[key] = new
            del module, new, same
            advance(count)


def check_finite(
    chosen: Mapping[nn.Linear, str] | Mapping[Layer, str], experts: Mapping[str, nn.Module] | None = None
) -> None:
    """Raise for the first module with a NaN or an infinity, before any module is changed."""
    weights = [(name, module.weight.detach()) for module, name in chosen.items()]
    for name, stacked in (experts or {}).items():
        weights += [(f"{name}.{s}", stacked._parameters[s].detach()) for s in projections(stacked)]  # type: ignore[union-attr]
    for name, weight in weights:
        if weight.device.type == "meta" or weight.numel() == 0:
            continue
        # encoding to float32 overflows where float64 does not
        if all(bool(torch.isfinite(end.float())) for end in torch.aminmax(weight)):
            continue
        try:
            encode(weight, "golden")
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None


def tell_transformers(model: nn.Module) -> None:
    """Let a model of transformers save its codes, and load them again, as one that was quantised while loading."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(model, modeling.PreTrainedModel):
        from .hf import attach

        attach(model)


def _encode_module(
    name: str, module: Layer, codec: str, size: int | None, report: ConversionReport, comparison: WeightComparison
) -> QINSLinear | QINSEmbedding:
    weight = module.weight
    quality = math.nan
    encoded = None
    if weight.device.type != "meta":
        encoded = encode(weight, codec, group_size=size)
        quality = comparison.snr_db(weight, encoded)
    new = _from_encoded(module, encoded, codec, size)
    after = sum(b.numel() * b.element_size() for b in new._buffers.values() if b is not None)
    before = weight.numel() * weight.element_size()
    report.converted.append(ConvertedModule(name, tuple(weight.shape), codec, size, before, after, quality))
    return new


def _from_encoded(
    module: Layer, encoded: EncodedArray | None, codec: str, size: int | None
) -> QINSLinear | QINSEmbedding:
    if isinstance(module, nn.Embedding):
        return QINSEmbedding.from_encoded(module, encoded, codec, size)
    return QINSLinear.from_encoded(module, encoded, codec, size)


def sharing_codes(
    name: str, module: Layer, same: QINSLinear | QINSEmbedding, report: ConversionReport
) -> QINSLinear | QINSEmbedding:
    """Return a module of codes for one whose weight another one has been encoded from, with its codes."""
    new = _from_encoded(module, None, same.codec, same.group_size)
    new._buffers.update(same._buffers)
    if isinstance(same, QINSEmbedding):  # which are saved once
        new._non_persistent_buffers_set.update(new._names)
    kind = "Embedding" if isinstance(module, nn.Embedding) else "Linear"
    report.skipped.append(SkippedModule(name, kind, "shares the codes of a module with the same weight"))
    return new


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Register on a module what is registered on the one that it replaces."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(new, hooks).update(getattr(old, hooks))
