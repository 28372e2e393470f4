"""Draws docs/ladder.svg, distance over bits, from the figures of fidelity.py.

    python benchmarks/ladder_picture.py figures.json ... [--write docs/ladder.svg]

`fidelity.py --plot` draws it too; this script only saves another run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from picture import DOCS, INK, OTHERS, OURS, PAPER, as_svg, themed

TITLES = {
    "SmolLM2": "SmolLM2-135M-Instruct", "dithered": "SmolLM2, weights off Q4_1's grid",
    "MiniLM": "all-MiniLM-L6-v2", "Whisper": "Whisper tiny.en", "random": "random weights",
}  # fmt: skip
RUNGS = ("log4", "log5", "log6", "log8")
_NEAR_BITS, _NEAR_RATIO = 0.2, 1.7  # of points whose labels would overlap


def draw(results: list[dict[str, Any]]) -> str:
    """Return the picture as SVG: a panel for each model of fidelity.py's results."""
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in results))
    with themed():
        columns = min(2, len(models))
        rows = -(-len(models) // columns)
        figure, panels = plt.subplots(
            rows, columns, figsize=(5.0 * columns, 3.1 * rows), facecolor=PAPER, squeeze=False, layout="constrained"
        )
        for axes, model in zip(panels.flat, models, strict=False):
            _draw_panel(axes, model, {r["format"]: r for r in results if r["model"] == model})
        pairs = [p for axes in panels.flat for p in zip(*axes.get_legend_handles_labels(), strict=True)]
        legend = {label: handle for handle, label in reversed(pairs)}
        if len(models) < panels.size:
            panels[-1, -1].set_axis_off()
            panels[-1, -1].legend(legend.values(), legend, loc="center", frameon=False)
        else:
            figure.legend(legend.values(), legend, loc="outside upper center", ncols=3, frameon=False)
        return as_svg(figure)


def _draw_panel(axes: Any, model: str, found: dict[str, dict[str, Any]]) -> None:
    def line(names: list[str], label: str, **style: Any) -> None:
        points = sorted((found[n]["bits"], found[n]["distance"]) for n in names if n in found)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)

    line(list(RUNGS), "qins, not calibrated", color=OURS, marker="o", markersize=4, linestyle="--", linewidth=1)
    line([f"calibrated {c}" for c in RUNGS], "qins, calibrated", color=OURS, marker="o", markersize=5, linewidth=1.6)
    plans = [n for n in found if n.startswith("plan")]
    line(plans, "qins, calibrated, by a plan", color=INK, marker="D", markersize=3, linewidth=0.8)
    gptq = [n for n in found if n.startswith("GPTQ")]
    line(gptq, "GPTQ int4, calibrated, groups of 128 and 64", color="#c2703d", marker="s", markersize=4, linewidth=1)
    ours = {*RUNGS, *plans, *(n for n in found if n.startswith("calibrated"))}
    peers = [n for n in found if n not in ours and n not in gptq]
    line(peers, "other formats, not calibrated", color=OTHERS, marker="s", markersize=4, linestyle="none")
    for at, names in _labels({n: (found[n]["bits"], found[n]["distance"]) for n in peers}):
        up = 4 * len(names)
        axes.annotate("\n".join(names), at, (5, up), textcoords="offset points", fontsize=7.5, alpha=0.85, va="top")
    for codec in RUNGS:
        if codec in found:
            lower = found.get(f"calibrated {codec}", found[codec])
            at = lower["bits"], lower["distance"]
            axes.annotate(codec, at, (-4, -8), textcoords="offset points", fontsize=7.5, color=OURS, ha="right")
    states = all(r["top_1"] is None for r in found.values())
    axes.set_title(TITLES.get(model, model), fontsize=9.5, weight="bold", loc="left")
    axes.set_ylabel("1 - cosine" if states else "KL divergence, nats")
    axes.set_xlabel("bits per weight")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.set_xlim(3.8, 9.2)
    axes.grid(alpha=0.2, color=INK, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _labels(points: dict[str, tuple[float, float]]) -> list[tuple[tuple[float, float], list[str]]]:
    """Return labels: a place, and the names of the points from there downward that are too close for one each."""
    found: list[tuple[tuple[float, float], list[str]]] = []
    last = 0.0, 0.0
    for name, (bits, distance) in sorted(points.items(), key=lambda p: (p[1][0], -p[1][1])):
        if abs(bits - last[0]) < _NEAR_BITS and last[1] < _NEAR_RATIO * distance:
            found[-1][1].append(name)
        else:
            found.append(((bits, distance), [name]))
        last = bits, distance
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="+", help="what fidelity.py --json wrote; of several runs")
    parser.add_argument("--write", type=Path, default=DOCS / "ladder.svg")
    arguments = parser.parse_args()
    results = [r for path in arguments.figures for r in json.loads(path.read_text("utf-8"))["results"]]
    arguments.write.write_text(draw(results), encoding="utf-8")


if __name__ == "__main__":
    main()
