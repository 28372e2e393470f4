"""Draws docs/ladder.svg, distance over bits, from the figures of fidelity.py.

    python benchmarks/ladder_picture.py figures.json [--write docs/ladder.svg]

`fidelity.py --plot` draws it too; this script only saves another run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from picture import DOCS, INK, OTHERS, OURS, PAPER, as_svg, themed

TITLES = {
    "SmolLM2": "SmolLM2-135M-Instruct", "MiniLM": "all-MiniLM-L6-v2", "Whisper": "Whisper tiny.en",
    "random": "random weights",
}  # fmt: skip
RUNGS = ("log4", "log5", "log6", "log8")
_MOST_BITS = 9.0


def draw(results: list[dict[str, Any]]) -> str:
    """Return the picture as SVG: a panel for each model of fidelity.py's results."""
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in results))
    with themed():
        columns = min(2, len(models))
        rows = -(-len(models) // columns)
        figure, panels = plt.subplots(
            rows, columns, figsize=(5.0 * columns, 3.3 * rows), facecolor=PAPER, squeeze=False, layout="constrained"
        )
        for axes in panels.flat[len(models) :]:
            axes.remove()
        for axes, model in zip(panels.flat, models, strict=False):
            _draw_panel(axes, model, {r["format"]: r for r in results if r["model"] == model})
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
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
    line(gptq, "GPTQ int4, calibrated", color="#c2703d", marker="s", markersize=4, linewidth=1)
    ours = {*RUNGS, *plans, *(n for n in found if n.startswith("calibrated"))}
    peers = [n for n in found if n not in ours and n not in gptq]
    line(peers, "other formats, not calibrated", color=OTHERS, marker="s", markersize=4, linestyle="none")
    for name in (*peers, *gptq):
        at = found[name]["bits"], found[name]["distance"]
        axes.annotate(name, at, (4, 2), textcoords="offset points", fontsize=7.5, alpha=0.85)
    for codec in RUNGS:
        if codec in found:
            at = found[codec]["bits"], found[codec]["distance"]
            axes.annotate(codec, at, (-4, -9), textcoords="offset points", fontsize=7.5, color=OURS, ha="right")
    states = all(r["top_1"] is None for r in found.values())
    axes.set_title(TITLES.get(model, model), fontsize=9.5, weight="bold", loc="left")
    axes.set_ylabel("1 - cosine" if states else "KL divergence, nats")
    axes.set_xlabel("bits per weight")
    axes.set_yscale("log")
    axes.set_xlim(4, _MOST_BITS)
    axes.grid(alpha=0.2, color=INK, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="what fidelity.py --json wrote")
    parser.add_argument("--write", type=Path, default=DOCS / "ladder.svg")
    arguments = parser.parse_args()
    results = json.loads(arguments.figures.read_text("utf-8"))["results"]
    arguments.write.write_text(draw(results), encoding="utf-8")


if __name__ == "__main__":
    main()
