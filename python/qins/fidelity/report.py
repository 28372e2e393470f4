"""The report of `qins eval`: one self-contained HTML page, and its pictures as PNG files."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from . import metrics
from .evaluation import Evaluation, Measured
from .subjects import ENCODER

# Of medium lightness, distinct on white and on black; markers and dashes carry the same information without color.
_COLORS = ("#3b8ed0", "#e0762f", "#2fa36b", "#c05fb0", "#a8921f", "#7d7fd6", "#d0525b", "#3aa3a8", "#8a8a8a")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 1, 2)))

# Placeholder for the page's text color in pictures drawn for it.
_INK = "#010203"
_SVG_STYLE = "<style>:root{color:#1d2126}@media (prefers-color-scheme:dark){:root{color:#e4e7ea}}</style>"

# Number of worst predictions shown, and of tokens before each.
_WORST, _CONTEXT = 12, 14

Draw = Callable[[Any], None]

# Other formats, as in docs/measurements.md: bits per weight, mean KL divergence and its 99th percentile. Shown beside a
# model that is measured alone.
KNOWN: dict[str, tuple[float, ...]] = {
    "bf16 weights": (16.00, 1.14e-04, 9.1e-04),
    "uint8 per 64": (8.50, 2.17e-03, 1.7e-02),
    "Q8_0": (8.50, 3.62e-03, 3.2e-02),
    "int8 per row": (8.05, 7.25e-03, 5.4e-02),
    "fp8 e4m3 per row": (8.05, 4.62e-02, 3.5e-01),
}
KNOWN_ON = "SmolLM2-135M-Instruct, 2,044 predictions of the English text that ships with qins"
# For encoders: bits per weight, and 1 - mean cosine of embeddings.
KNOWN_ENCODER: dict[str, tuple[float, ...]] = {
    "bf16 weights": (16.00, 6.9e-06),
    "uint8 per 64": (8.50, 1.4e-04),
    "Q8_0": (8.50, 1.4e-04),
    "int8 per row": (8.06, 4.9e-04),
    "fp8 e4m3 per row": (8.06, 1.7e-03),
}
KNOWN_ENCODER_ON = "all-MiniLM-L6-v2, 106 passages of the English text that ships with qins"
_GRAY = "#8a8a8a"


def pictures(e: Evaluation) -> dict[str, tuple[str, str, Draw]]:
    """Return the pictures: name to title, description, and the function that draws it on a figure."""
    what, unit = _measure(e)
    means = {m.name: float(_values(m).mean()) for m in e.measured}
    best = min(means, key=lambda name: means[name])
    known, on = _known(e)
    beside = (
        f" Gray: other formats, measured on {on}; not on this model and text. `qins eval {e.about['reference']}` "
        "measures them on this one."
        if known
        else ""
    )
    if len(means) > 1:
        said = f"Mean {what} of each model, with its bits per quantized weight, scales included; lower is better. "
        said += f"Best: {best}, {means[best]:.2e}{unit}."
    else:
        said = f"Mean {what} of {best}: {means[best]:.2e}{unit}; lower is better. Bits are per quantized weight."
    made: dict[str, tuple[str, str, Draw]] = {
        "size": (
            "Size and fidelity",
            said + beside,
            lambda f: _draw_size(f, e.measured, f"mean {what},{unit}".rstrip(","), known),
        ),
        "tokens": (
            "Divergence by token",
            f"Share of {_tokens(e)} whose {_by_token(e)[0]} exceeds a value; lower lines are better."
            + (f" Gray: the 99th percentile of other formats, measured on {on}." if known is KNOWN else ""),
            lambda f: _draw_tokens(f, e, known),
        ),
    }
    if any(map(_inexact, e.measured)):
        made["layers"] = (
            "Error by layer",
            "Signal-to-noise ratio of each layer's output, given the float model's input; higher is better.",
            lambda f: _draw_layers(f, e.measured),
        )
    if any(m.tokens_per_second for m in e.measured):
        made["speed"] = (
            "Speed",
            "Tokens per second of greedy decoding, one sequence at a time, on this machine.",
            lambda f: _draw_speed(f, e),
        )
    if e.levels:
        made["levels"] = (
            "Weights and levels",
            f"Weights of {e.levels['layer']} over the scale of their group; below them, the levels of log8.",
            lambda f: _draw_levels(f, e.levels),
        )
    return made


def _tokens(e: Evaluation) -> str:
    return "tokens" if e.about["kind"] == ENCODER else "predictions"


def _by_token(e: Evaluation) -> tuple[str, str]:
    """Return the metric of a single token, and its unit."""
    return ("1 - cosine of hidden states", "") if e.about["kind"] == ENCODER else ("KL divergence", " nats")


def _measure(e: Evaluation) -> tuple[str, str]:
    """Return the metric of a model, and its unit."""
    return ("1 - cosine of embeddings", "") if e.about["kind"] == ENCODER else _by_token(e)


def _values(m: Measured) -> torch.Tensor:
    """Return the values whose mean is the metric of a model."""
    if m.comparison is None and m.similarity is not None:
        return m.similarity.embeddings
    return m.distances


def _known(e: Evaluation) -> tuple[dict[str, tuple[float, ...]], str]:
    """Return known figures to show beside a model that is measured alone, and what they were measured on."""
    if "model" not in e.about:
        return {}, ""
    return (KNOWN_ENCODER, KNOWN_ENCODER_ON) if e.about["kind"] == ENCODER else (KNOWN, KNOWN_ON)


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}


def _draw_size(figure: Any, measured: Sequence[Measured], what: str, known: Mapping[str, tuple[float, ...]]) -> None:
    axes = figure.subplots()
    points: list[tuple[str, float, float, float, dict[str, Any]]] = [
        (m.name, m.bits, float(_values(m).mean()), metrics.standard_error(_values(m)), _style(i))
        for i, m in enumerate(measured)
    ]
    gray = {"color": _GRAY, "marker": "o", "mfc": "none"}
    points += [(name, figures[0], figures[1], 0.0, gray) for name, figures in known.items()]
    names = []
    for y, (name, bits, mean, error, style) in enumerate(sorted(points, key=lambda p: p[2])):
        names.append(name if bits != bits else f"{name}, {bits:.2f} bits")
        axes.errorbar(max(mean, 1e-9), y, xerr=error or None, ms=8, capsize=3, **style)
        axes.annotate(f"{mean:.2e}", (max(mean, 1e-9), y), xytext=(12, -4), textcoords="offset points")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.25, y=0.12)
    axes.set(xscale="log", xlabel=what)
    axes.grid(alpha=0.25, axis="x")


def _draw_tokens(figure: Any, e: Evaluation, known: Mapping[str, tuple[float, ...]]) -> None:
    axes = figure.subplots()
    for i, m in enumerate(e.measured):
        values = m.distances.clamp_min(1e-9).sort().values
        share = 1 - torch.arange(values.numel()) / values.numel()
        axes.plot(
            values, share, linestyle=_DASHES[i % len(_DASHES)], markevery=(i * 17, max(1, values.numel() // 6)), ms=5,
            label=m.name, **_style(i),
        )  # fmt: skip
    most = max((figures[2] for figures in known.values() if len(figures) > 2), default=0.0)
    for name, figures in known.items():
        if len(figures) > 2:
            axes.plot(figures[2], 0.01, "o", color=_GRAY, mfc="none", ms=7)
            axes.annotate(name, (figures[2], 0.01), xytext=(4, 6), textcoords="offset points", rotation=40, fontsize=8)
    what, unit = _by_token(e)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"{what} of a token,{unit}".rstrip(","),
        ylabel=f"share of {_tokens(e)} above",
    )
    least = min(float(m.distances.median()) for m in e.measured)
    axes.set_xlim(max(1e-9, min(1e-6, least / 10)), max(axes.get_xlim()[1], 5 * most))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2)


def _inexact(m: Measured) -> bool:
    """Return whether any layer's outputs have an error to show."""
    return any(x["output_snr_db"] != math.inf for x in m.layers.values())


def _draw_layers(figure: Any, measured: Sequence[Measured]) -> None:
    shown = [m for m in measured if _inexact(m)][:3]
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
        axes.barh(
            name,
            speed,
            min(0.8, 0.25 * len(bars)),
            color=_COLORS[i % len(_COLORS)],
            hatch=hatches[i % len(hatches)],
            alpha=0.85,
        )
        axes.annotate(f" {speed:.1f}", (speed, i), va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="tokens per second")


def _draw_levels(figure: Any, levels: dict[str, Any]) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    reach, counts = levels["range"], levels["counts"]
    width = 2 * reach / len(counts)
    top.bar([-reach + width * (i + 0.5) for i in range(len(counts))], counts, width, color=_COLORS[0])
    top.set(ylabel="weights", title=f"{levels['layer']}, mu = {levels['mu']:.2f}")
    both = [s * v for v in levels["levels"] for s in (-1, 1)]
    bottom.eventplot(both, linewidths=0.6, colors=_COLORS[1])
    bottom.set(yticks=[], xlabel="weight over the scale of its group", ylabel="levels")


def _render(draw: Draw, ink: str, kind: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color",
               "grid.color", "legend.labelcolor", "hatch.color")  # fmt: skip
    page = kind == "svg"
    rc: Any = dict.fromkeys(colors, ink) | {
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
    """Return the predictions where a model differs most from the reference, with the tokens before them."""
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
            "forced": "" if m.forced is None else f"{100 * m.forced:.1f} %",
            "speed": f"{m.tokens_per_second:.1f}" if m.tokens_per_second else "",
            "peak": f"{m.peak_bytes / 1e6:,.0f}" if m.peak_bytes else "",
        }
    )


def _predictions(m: Measured) -> dict[str, str]:
    if m.comparison is None:
        return {}
    f = m.comparison.summary()
    change, error = 100 * math.expm1(f.log_ratio), 100 * math.exp(f.log_ratio) * f.log_ratio_error
    return {
        "kl": f"{f.kl_mean:.2e} ± {f.kl_mean_error:.0e}",
        "median": f"{f.kl_median:.1e}",
        "p99": f"{f.kl_p99:.2e}",
        "max": f"{f.kl_max:.2g}",
        "top1": f"{100 * f.top1:.2f} %",
        "top5": f"{100 * f.top5:.2f} %",
        "perplexity": f"{f.perplexity:,.3f}",
        "ratio": f"{change:+.3f} ± {error:.3f} %",
    }


def _states(m: Measured) -> dict[str, str]:
    if m.similarity is None:
        return {}
    f = m.similarity.summary()
    return {
        "cosine": f"1 - {f['distance_mean']:.1e}",
        "cosine_p99": f"1 - {f['distance_p99']:.1e}",
        "cosine_min": f"1 - {f['distance_max']:.1e}",
        "embedding": f"1 - {f['embedding_distance_mean']:.1e}",
        "embedding_min": f"1 - {f['embedding_distance_max']:.1e}",
    }


# Titles of the tables' columns; each table begins with the model.
_FIDELITY = {
    "kl": "KL divergence, mean", "median": "median", "p99": "99th percentile", "max": "maximum",
    "top1": "same top token", "top5": "same top five tokens", "perplexity": "perplexity", "ratio": "perplexity change",
}  # fmt: skip
_COSINES = {
    "cosine": "cosine of token states, mean", "cosine_p99": "99th percentile", "cosine_min": "lowest",
    "embedding": "cosine of embeddings, mean", "embedding_min": "lowest",
}  # fmt: skip
_COSTS = {
    "bits": "bits per weight", "bytes": "size in memory, MB", "peak": "peak memory, MB", "speed": "tokens per second",
    "forced": "greedy tokens still most likely", "greedy": "greedy tokens before the first difference",
}  # fmt: skip
_TABLES = {"Predictions": _FIDELITY, "Hidden states": _COSINES, "Size, speed, continuations": _COSTS}


def report_rows(e: Evaluation) -> list[dict[str, str]]:
    """Return the figures as text, one dictionary per model, without those that were not measured."""
    return [{key: said for key, said in _row(m).items() if said} for m in e.measured]


def report_tables(e: Evaluation) -> dict[str, dict[str, str]]:
    """Return the tables: title to columns (key of `report_rows` to title), without columns that have no figure."""
    made = report_rows(e)
    found = {}
    for title, names in _TABLES.items():
        if shown := {key: name for key, name in names.items() if any(key in row for row in made)}:
            found[title] = {"name": "model"} | shown
    return found


def write_report(e: Evaluation, path: Path, tokenizer: Any) -> list[Path]:
    """Write the page, and a PNG of each picture beside it; return the paths."""
    import jinja2

    template = (resources.files("qins") / "data" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    drawn = pictures(e)
    html = environment.from_string(template).render(
        about=e.about,
        tables=report_tables(e),
        rows=report_rows(e),
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
