"""Draws docs/why-qins.svg from the tables of docs/measurements.md.

    python benchmarks/picture.py [--page docs/measurements.md] [--write docs/why-qins.svg]

`make measurements` draws it after it has written the page. The picture has no figures of its own: it reads the page's
tables, so the two cannot disagree.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"

# Label of a bar; its row in the page's speed table; its row in the fidelity table.
ROWS: tuple[tuple[str, str | None, str | None], ...] = (
    ("float32", "float32", None),
    ("bfloat16", "bfloat16", "bf16 model"),
    ("llama.cpp Q8_0", "llama.cpp Q8_0", "Q8_0"),
    ("qins log8", "`log8`, the rest bfloat16", "log8"),
    ("qins log8, calibrated", None, "calibrated"),
)
SPEED, FIDELITY = "Speed", "Fidelity"
# A peer that generate.py leaves out where it is not installed.
OPTIONAL, NOT_MEASURED = "llama.cpp Q8_0", "not measured"
# Title of a panel; section and column of the page; which direction is better.
PANELS = (
    ("Weights, GB", SPEED, "weights GB", "less"),
    ("Decode, tokens/s", SPEED, "decode tokens/s", "more"),
    ("Prefill, tokens/s", SPEED, "prefill tokens/s", "more"),
    ("KL divergence, nats", FIDELITY, "mean KLD", "less"),
)

OURS, OTHERS = "#3b8ed0", "#98a1ab"  # readable on light and on dark paper
INK, PAPER = "#010203", "#fdfcfb"  # placeholders, replaced by the theme's colors in the SVG
_STYLE = (
    "<style>:root{color:#1d2126}.paper{fill:#ffffff}"
    "@media (prefers-color-scheme:dark){:root{color:#e4e7ea}.paper{fill:#14181d}}</style>"
)


def table_of(page: str, section: str) -> dict[str, dict[str, str]]:
    """Return the first table of a section: the name of each row to its cells by column.

    Raises:
        ValueError: the page has no such section, or the section has no table.

    """
    found = re.search(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    lines = re.search(r"(?:^\|.*\n)+", found[1], re.MULTILINE) if found else None
    if lines is None:
        raise ValueError(f"page: expected a section '## {section}' with a table, got none")
    head, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines[0].splitlines())
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def figures(page: str) -> list[list[str]]:
    """Return the cells of each panel as they are in the page; empty where calibrated codes are as fast as others.

    Raises:
        ValueError: a section, row or column is missing.

    """
    tables = {section: table_of(page, section) for section in (SPEED, FIDELITY)}
    found = []
    for _, section, column, _ in PANELS:
        cells = []
        for label, fast, close in ROWS:
            name = fast if section == SPEED else close
            if name is None:  # float32 is the reference of the fidelity table
                cells.append("0" if section == FIDELITY and label == "float32" else "")
                continue
            if name == OPTIONAL and name not in tables[section]:
                cells.append(NOT_MEASURED)
                continue
            try:
                cells.append(tables[section][name][column].partition(" ")[0])
            except KeyError as e:
                raise ValueError(f"page: expected {e} in the table of '## {section}', got none") from None
        found.append(cells)
    return found


def draw(page: str) -> str:
    """Return the picture as SVG."""
    from matplotlib import pyplot as plt

    with themed():
        figure, panels = plt.subplots(1, len(PANELS), figsize=(10.0, 2.125), sharey=True, facecolor=PAPER)
        figure.subplots_adjust(left=0.15, right=0.985, top=0.80, bottom=0.05, wspace=0.12)
        for axes, cells, (title, _, _, better) in zip(panels, figures(page), PANELS, strict=True):
            _draw_panel(axes, cells, title, f"{better} is better")
        panels[0].set_yticks(range(len(ROWS)), [label for label, *_ in ROWS])
        panels[0].invert_yaxis()
        return as_svg(figure)


@contextmanager
def themed() -> Iterator[None]:
    """Within the block, figures have the style of these pictures."""
    import matplotlib

    matplotlib.use("Agg")
    colors = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    rc: Any = dict.fromkeys(colors, INK) | {
        "svg.fonttype": "none", "svg.hashsalt": "qins", "font.family": "sans-serif", "font.size": 9.0,
        "axes.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(rc):
        yield


def as_svg(figure: Any) -> str:
    """Return a figure as SVG with the colors of a light and a dark theme, and close it."""
    from matplotlib import pyplot as plt

    out = io.StringIO()
    figure.savefig(out, format="svg", facecolor=PAPER, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = out.getvalue().replace(f'style="fill: {PAPER}"', 'class="paper"').replace(INK, "currentColor")
    at = svg.index(">", svg.index("<svg")) + 1
    lines = (line.rstrip() for line in (svg[:at] + _STYLE + svg[at:]).splitlines())
    return "\n".join(lines) + "\n"


def _draw_panel(axes: Any, cells: list[str], title: str, better: str) -> None:
    values = [float(c) if c not in ("", NOT_MEASURED) else 0.0 for c in cells]
    most = max(values)
    for y, (cell, value, (label, *_)) in enumerate(zip(cells, values, ROWS, strict=True)):
        ours = label.startswith("qins")
        axes.barh(y, value, 0.66, color=OURS if ours else OTHERS)
        axes.text(value + 0.03 * most, y, _said(cell), va="center", weight="bold" if ours and cell else "normal")
    axes.set_title(title, fontsize=9.5, weight="bold", loc="left", pad=14)
    axes.text(0, 1.03, better, transform=axes.transAxes, fontsize=8, alpha=0.75)
    axes.set_xlim(0, 1.42 * most)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _said(cell: str) -> str:
    """Return the label of a cell; numbers in scientific notation get two digits."""
    if cell in ("", NOT_MEASURED):
        return cell or "as log8"
    return f"{float(cell):.1e}".replace("e-0", "e-") if "e" in cell else cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=DOCS / "measurements.md")
    parser.add_argument("--write", type=Path, default=DOCS / "why-qins.svg")
    arguments = parser.parse_args()
    arguments.write.write_text(draw(arguments.page.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
