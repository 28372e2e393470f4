"""The examples of the documentation run, and its pages and links are there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import qins

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p for p in (DOCS.glob("*.md") if DOCS.is_dir() else ()))

pytestmark = pytest.mark.once


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples(page):
    blocks = re.findall(r"^```pycon\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    if page.name in ("index.md", "recipes.md"):
        assert len(blocks) > 1
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_fits_its_column(page):
    """No line of code is longer than the site's column, of 80 letters in a window of 1,300 pixels."""
    fenced, long = False, []
    for line in page.read_text("utf-8").splitlines():
        fenced ^= line.startswith("```")
        if len(line) > 80 + 4 * (not fenced) and (fenced or line.startswith("    ")):
            long.append(line)
    assert long == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_every_public_name_is_in_the_api():
    text = (DOCS / "api.md").read_text("utf-8")
    described = {m.rpartition(".")[2] for m in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    # reports that functions return, and the deprecated baseline
    others = {"CalibrationReport", "InspectionReport", "MemoryReport", "Plan", "rational"}
    assert set(qins.__all__) - others == described & set(qins.__all__)
    assert not described - set(qins.__all__) - {"quantize_checkpoint"}
