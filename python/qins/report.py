"""The report of `qins eval`: one page that needs nothing else, and its pictures as PNG files."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from . import evaluate
from .evaluation import Evaluation, Measured
from .subjects import ENCODER

# Of middling lightness, told apart on white and on black; markers and dashes say the same without colour.
_COLOURS = ("#3b8ed0", "#e0762f", "#2fa36b", "#c05fb0", "#a8921f", "#7d7fd6", "#d0525b", "#3aa3a8", "#8a8a8a")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 1, 2)))

# Stands for the page's text colour in pictures that are made for it.
_INK = "#010203"
_SVG_STYLE = "<style>:root{color:#1d2126}@media (prefers-color-scheme:dark){:root{color:#e4e7ea}}</style>"

# Worst predictions that are shown, and tokens before each.
_WORST, _CONTEXT = 12, 14

Draw = Callable[[Any], None]


def pictures(e: Evaluation) -> dict[str, tuple[str, str, Draw]]:
    """Name of each picture to its title, what it shows in words, and the function that draws it on a figure."""
    best = min(e.measured, key=lambda m: float(m.distances.mean()))
    what, unit = _measure(e)
    made: dict[str, tuple[str, str, Draw]] = {
        "size": (
            "Size and fidelity",
            f"Mean {what} of each model, with its bits a quantized weight, scales included; less is better. "
            f"The least is {best.name}'s, {float(best.distances.mean()):.2e}{unit}.",
            lambda f: _draw_size(f, e.measured, what + unit),
        ),
        "tokens": (
            "Divergence by token",
            f"Share of tokens whose {what} is above a value; lower lines are better.",
            lambda f: _draw_tokens(f, e.measured, what + unit),
        ),
    }
    if any(m.layers for m in e.measured):
        made["layers"] = (
            "Error by layer",
            "Signal to noise ratio of each layer's output, given the float model's input; higher is better.",
            lambda f: _draw_layers(f, e.measured),
        )
    if any(m.tokens_per_second for m in e.measured):
        made["speed"] = (
            "Speed",
            "Tokens a second of greedy decoding, one sequence at a time, on this machine.",
            lambda f: _draw_speed(f, e),
        )
    if e.levels:
        made["levels"] = (
            "Weights and levels",
            f"Weights of {e.levels['layer']} over the scale of their group, and log8's levels below them.",
            lambda f: _draw_levels(f, e.levels),
        )
    return made


def _measure(e: Evaluation) -> tuple[str, str]:
    """What the pictures show of each token, and its unit."""
    return ("1 - cosine of hidden states", "") if e.about["kind"] == ENCODER else ("KL divergence", ", nats")


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}


def _draw_size(figure: Any, measured: Sequence[Measured], what: str) -> None:
    axes = figure.subplots()
    best_first = sorted(enumerate(measured), key=lambda im: float(im[1].distances.mean()))
    names = []
    for y, (i, m) in enumerate(best_first):
        mean, error = float(m.distances.mean()), evaluate.standard_error(m.distances)
        names.append(f"{m.name}, {m.bits:.2f} bits")
        axes.errorbar(max(mean, 1e-9), y, xerr=error, ms=8, capsize=3, **_style(i))
        axes.annotate(f"{mean:.2e}", (max(mean, 1e-9), y), xytext=(12, -4), textcoords="offset points")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xscale="log", xlabel=f"mean {what}")
    axes.grid(alpha=0.25, axis="x")


def _draw_tokens(figure: Any, measured: Sequence[Measured], what: str) -> None:
    axes = figure.subplots()
    for i, m in enumerate(measured):
        kl = m.distances.clamp_min(1e-9).sort().values
        share = 1 - torch.arange(kl.numel()) / kl.numel()
        axes.plot(
            kl, share, linestyle=_DASHES[i % len(_DASHES)], markevery=(i * 17, max(1, kl.numel() // 6)), ms=5,
            label=m.name, **_style(i),
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=f"{what}, of a token", ylabel="share above")
    axes.set_xlim(left=1e-8 if "cosine" in what else 1e-6)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2)


def _draw_layers(figure: Any, measured: Sequence[Measured]) -> None:
    shown = [m for m in measured if m.layers][:3]
    rows = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, m in zip(rows, shown, strict=True):
        kinds: dict[str, list[tuple[int, float]]] = {}
        for i, (name, snr) in enumerate(m.layers.items()):
            if snr["output_snr_db"] != float("inf"):
                kinds.setdefault(name.rpartition(".")[2], []).append((i, snr["output_snr_db"]))
        for i, (kind, points) in enumerate(kinds.items()):
            axes.plot(*zip(*points, strict=True), linestyle="", ms=4, label=kind, **_style(i))
        axes.set(title=m.name, ylabel="SNR, dB")
        axes.grid(alpha=0.25)
    rows[0].legend(fontsize=8, ncols=4)
    rows[-1].set_xlabel("layer, in the model's order")


def _draw_speed(figure: Any, e: Evaluation) -> None:
    axes = figure.subplots()
    bars = {m.name: m.tokens_per_second for m in e.measured if m.tokens_per_second}
    if e.about.get("reference_tokens_per_second"):
        bars = {"float32": e.about["reference_tokens_per_second"]} | bars
    hatches = ("", "//", "..", "xx", "\\\\", "++", "oo")
    for i, (name, speed) in enumerate(bars.items()):
        axes.barh(name, speed, color=_COLOURS[i % len(_COLOURS)], hatch=hatches[i % len(hatches)], alpha=0.85)
        axes.annotate(f" {speed:.1f}", (speed, i), va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="tokens a second")


def _draw_levels(figure: Any, levels: dict[str, Any]) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    reach, counts = levels["range"], levels["counts"]
    width = 2 * reach / len(counts)
    top.bar([-reach + width * (i + 0.5) for i in range(len(counts))], counts, width, color=_COLOURS[0])
    top.set(ylabel="weights", title=f"{levels['layer']}, mu = {levels['mu']:.2f}")
    both = [s * v for v in levels["levels"] for s in (-1, 1)]
    bottom.eventplot(both, linewidths=0.6, colors=_COLOURS[1])
    bottom.set(yticks=[], xlabel="weight over the scale of its group", ylabel="levels")


def _render(draw: Draw, ink: str, kind: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color",
               "grid.color", "legend.labelcolor", "hatch.color")  # fmt: skip
    page = kind == "svg"
    rc: Any = dict.fromkeys(colours, ink) | {
        "svg.fonttype": "none", "svg.hashsalt": "qins", "font.family": "sans-serif", "legend.framealpha": 0.0,
        "axes.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(rc):
        figure = plt.figure(figsize=(8.4, 4.8), layout="constrained", facecolor="none" if page else "white")
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=130, metadata={"Date": None} if page else None)
        plt.close(figure)
    return out.getvalue()


def _svg_uri(draw: Draw) -> str:
    svg = _render(draw, _INK, "svg").decode().replace(_INK, "currentColor")
    start = svg.index("<svg")
    end = svg.index(">", start) + 1
    whole = svg[start:end] + _SVG_STYLE + svg[end:]
    return "data:image/svg+xml;base64," + base64.b64encode(whole.encode()).decode()


def worst_predictions(e: Evaluation, m: Measured, tokenizer: Any) -> list[dict[str, Any]]:
    """The predictions where a model differs most from the reference, with what stood before them."""
    if m.comparison is None:
        return []
    starts, before = [], 0
    for item in e.items:
        starts.append((before, item))
        before += item.at.numel()
    worst = []
    for i in m.comparison.kl.topk(min(_WORST, m.comparison.kl.numel())).indices.tolist():
        start, item = next((s, it) for s, it in reversed(starts) if s <= i)
        at = int(item.at[i - start])
        kl, top, other = (getattr(m.comparison, n)[i] for n in ("kl", "top", "other_top"))
        worst.append(
            {
                "context": tokenizer.decode(item.text[max(0, at - _CONTEXT) : at]),
                "expected": tokenizer.decode(item.text[at]),
                "reference": tokenizer.decode(top),
                "model": tokenizer.decode(other),
                "kl": float(kl),
            }
        )
    return worst


def _row(m: Measured) -> dict[str, str]:
    whole = sum(m.bytes.values())
    return (
        _predictions(m)
        | _states(m)
        | {
            "name": m.name,
            "bits": "" if m.bits != m.bits else f"{m.bits:.2f}",
            "bytes": f"{whole / 1e6:,.1f}" if whole else "",
            "greedy": ", ".join(map(str, m.greedy_same)),
            "forced": "" if m.forced is None else f"{100 * m.forced:.1f}",
            "speed": f"{m.tokens_per_second:.1f}" if m.tokens_per_second else "",
            "peak": f"{m.peak_bytes / 1e6:,.0f}" if m.peak_bytes else "",
        }
    )


def _predictions(m: Measured) -> dict[str, str]:
    if m.comparison is None:
        return {}
    f = m.comparison.summary()
    return {
        "kl": f"{f.kl_mean:.2e} ± {f.kl_mean_error:.0e}",
        "median": f"{f.kl_median:.1e}",
        "p99": f"{f.kl_p99:.2e}",
        "max": f"{f.kl_max:.2g}",
        "top1": f"{100 * f.top1:.2f}",
        "top5": f"{100 * f.top5:.2f}",
        "ratio": f"{100 * f.log_ratio:+.3f} ± {100 * f.log_ratio_error:.3f}",
    }


def _states(m: Measured) -> dict[str, str]:
    if m.similarity is None:
        return {}
    f = m.similarity.summary()
    return {
        "cosine": f"1 - {f['distance_mean']:.1e}",
        "cosine_min": f"1 - {f['distance_max']:.1e}",
        "embedding": f"1 - {f['embedding_distance_mean']:.1e}",
        "embedding_min": f"1 - {f['embedding_distance_max']:.1e}",
    }


COLUMNS = {
    "name": "model", "bits": "bits a weight", "bytes": "MB", "kl": "mean KLD", "median": "median", "p99": "99 %",
    "max": "most", "top1": "top-1 %", "top5": "top-5 %", "ratio": "log perplexity, % more",
    "cosine": "cosine of token states, mean", "cosine_min": "least", "embedding": "cosine of embeddings, mean",
    "embedding_min": "least", "greedy": "greedy, same", "forced": "forced %", "speed": "tokens/s", "peak": "peak MB",
}  # fmt: skip


def rows(e: Evaluation) -> list[dict[str, str]]:
    """The table, a dictionary of COLUMNS a model."""
    return [dict.fromkeys(COLUMNS, "") | _row(m) for m in e.measured]


def columns(e: Evaluation) -> dict[str, str]:
    """Those of COLUMNS in which a model has a figure."""
    made = rows(e)
    return {key: title for key, title in COLUMNS.items() if any(row[key] for row in made)}


def write(e: Evaluation, path: Path, tokenizer: Any) -> list[Path]:
    """Write the page, and beside it a PNG of each picture; return what was written."""
    import jinja2

    template = (resources.files("qins") / "data" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    drawn = pictures(e)
    html = environment.from_string(template).render(
        about=e.about,
        columns=columns(e),
        rows=rows(e),
        pictures=[{"title": t, "words": words, "uri": _svg_uri(draw)} for t, words, draw in drawn.values()],
        worst=[{"name": m.name, "tokens": worst_predictions(e, m, tokenizer)} for m in e.measured[:2] if m.comparison],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, "utf-8")
    written = [path]
    for name, (_, _, draw) in drawn.items():
        png = path.with_name(f"{path.stem}-{name}.png")
        png.write_bytes(_render(draw, "#1d2126", "png"))
        written.append(png)
    return written
