"""Documentation: its examples run, its pages and links exist, and its figures agree."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import qins

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks"
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


def test_every_promise_names_a_test():
    """The tests that docs/security.md names exist, with the parameters that it names."""
    page, tests = (DOCS / "security.md").read_text("utf-8"), ROOT / "tests"
    file, found = "", 0
    for name in re.findall(r"`((?:\w+/\w+\.\w+: )?\w+(?:\[[\w ]+\])?)`", "".join(page.split("## What we do not")[0])):
        file, _, function = name.rpartition(": ") if ": " in name else (file, "", name)
        if ": " in name or function.startswith("test_"):
            text = (tests / file).read_text("utf-8")
            what, _, parameter = function.rstrip("]").partition("[")
            assert re.search(rf"\b{what}\(", text), name
            assert f'"{parameter}"' in text or not parameter, name
            found += 1
    assert found > 20


def test_every_public_name_is_in_the_api():
    text = (DOCS / "api.md").read_text("utf-8")
    described = {m.rpartition(".")[2] for m in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    # reports that functions return, and the deprecated baseline
    others = {"CalibrationReport", "InspectionReport", "MemoryReport", "Plan", "rational"}
    assert set(qins.__all__) - others == described & set(qins.__all__)
    assert not described - set(qins.__all__) - {"quantize_checkpoint", "quantize_on_ray", "restore_checkpoint"}


measured = pytest.mark.skipif(not (DOCS.is_dir() and BENCHMARKS.is_dir()), reason="the documentation is not here")


@measured
def test_the_measured_page_is_its_generators():
    """The text of docs/measurements.md is that of benchmarks/measurements.py; only figures differ between runs."""
    tree = ast.parse((BENCHMARKS / "measurements.py").read_text("utf-8"))
    page = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "page")
    text = next(n.value for n in ast.walk(page) if isinstance(n, ast.Return) and isinstance(n.value, ast.JoinedStr))
    words = "".join(re.escape(v.value) if isinstance(v, ast.Constant) else "(.+?)" for v in text.values)
    assert re.fullmatch(words, (DOCS / "measurements.md").read_text("utf-8"), re.DOTALL)


def load_picture():
    spec = importlib.util.spec_from_file_location("picture", BENCHMARKS / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    return picture


@measured
def test_the_picture_shows_the_measured_page():
    """What docs/why-qins.svg says is what the tables of docs/measurements.md say, so it was drawn from that page."""
    picture = load_picture()
    page = (DOCS / "measurements.md").read_text("utf-8")
    pytest.importorskip("matplotlib")
    committed, drawn = (
        re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        for svg in ((DOCS / "why-qins.svg").read_text("utf-8"), picture.draw(page))
    )
    assert committed == drawn
    cells = [c for panel in picture.figures(page) for c in panel if c]
    assert len(cells) == 17
    assert {picture._said(c) for c in cells} <= set(drawn)
    with pytest.raises(ValueError, match="expected 'float32' in the table of '## Speed'"):
        picture.figures(page.replace("| float32 | 2.02", "| other | 2.02"))
    with pytest.raises(ValueError, match="expected a section '## Speed'"):
        picture.figures(page.replace("## Speed", "## Other"))
    alone = "".join(line for line in page.splitlines(keepends=True) if not line.startswith("| llama.cpp"))
    assert picture.draw(alone).count(">not measured<") == 3


@measured
def test_the_readmes_table_is_of_the_measured_page():
    """Weights, decode, prefill and KL divergence of each format, rounded; and what the page says of bits."""
    picture = load_picture()
    page = (DOCS / "measurements.md").read_text("utf-8")
    lines = re.findall(r"^\|.*\|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    table = {row[0].strip("*").replace("`", ""): row for row in rows if len(row) == 7}
    fidelity = picture.table_of(page, picture.FIDELITY)
    for i, (label, _, name) in enumerate(picture.ROWS):
        row = table[label.removeprefix("qins ")]
        said = [row[6].removesuffix(" GB"), row[4], row[5], row[2]]
        for cell, cells in zip(said, picture.figures(page), strict=True):
            if cells[i] in ("", picture.NOT_MEASURED):
                assert cell == (cells[i] or "as `log8`")
            else:
                assert float(cell) == pytest.approx(float(cells[i]), rel=0.03)
        if name is not None:
            assert float(row[1]) == float(fidelity[name]["bits per weight"])
            assert float(row[3].removesuffix(" %")) == pytest.approx(float(fidelity[name]["top-1"][:-2]), abs=0.051)


SCRIPTS = sorted(p.name for p in BENCHMARKS.glob("*.py") if "__main__" in p.read_text())
# Each runs in a fork of a process that has imported what takes longest.
FORKS = """
import gc, os, pathlib, runpy, sys
import torch._dynamo, transformers.generation, transformers.models.llama.modeling_llama, qins.checkpoint, qins.fidelity
gc.freeze()  # else each child looks for garbage in it at its end, for seconds
for name in sys.argv[2:]:
    path = pathlib.Path(sys.argv[1], name)
    child = os.fork()
    if child == 0:
        for n in (1, 2):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), n)
        sys.argv, sys.path[0] = [str(path), "--help"], str(path.parent)
        runpy.run_path(str(path), run_name="__main__")
        sys.exit("it went on after --help")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    pathlib.Path(name + ".code").write_text(str(code))
"""


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    where = tmp_path_factory.mktemp("starts")
    subprocess.run([sys.executable, "-c", FORKS, str(BENCHMARKS), *SCRIPTS], cwd=where, check=True)
    return where


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmarks_start(starts, script):
    """Each script finds its imports, including helpers of the tests."""
    printed = (starts / script).read_text()
    assert ((starts / f"{script}.code").read_text(), printed[:6]) == ("0", "usage:"), printed
