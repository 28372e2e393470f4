"""The package's rooms: what they may import from one another, and names from before the rooms existed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from layers import above

import qins
from qins import _old_paths

pytestmark = pytest.mark.once

PACKAGE = Path(qins.__file__).parent
ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
TESTS = [p for room in ROOMS for p in sorted((Path(__file__).parent / room).glob("*.py"))]
MODULES = {
    ".".join(("qins", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
}


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Yield the package's modules that a module imports, each with the imported name."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    typing = {
        n for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)
    }
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or node in typing:
            continue
        origin = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{origin}.{alias.name}"
            yield (whole if whole in MODULES else origin), alias.name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_is_taken_from_another_room_is_what_it_exports(module):
    for origin, name in imports(module):
        mine, theirs = module.split(".")[1:2], origin.split(".")[1:]
        if theirs and theirs[0] in ROOMS and theirs[:1] != mine:
            exported = importlib.import_module(f"qins.{theirs[0]}").__all__
            assert name in exported, f"{module} takes {name} from {origin}"


@pytest.mark.parametrize("path", TESTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_tests_import_no_room_above_theirs(path):
    """Find early what `make test-rooms` would find minutes later."""
    hidden = above(path.parent.name)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        taken = {name.split(".")[1] for name in names if name.startswith("qins.")}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qins":
            taken = {qins._LAZY.get(node.attr)}
        assert not taken & hidden, f"line {node.lineno}"


def test_every_room_has_what_it_exports():
    for room in ROOMS:
        module = importlib.import_module(f"qins.{room}")
        assert sorted(module.__all__, key=str) == sorted(set(module.__all__))
        assert all(hasattr(module, name) for name in module.__all__)


def test_no_circle_of_modules():
    """No import cycles, not even ones that imports inside functions hide."""
    edges = {m: {o for o, name in imports(m) if o != m and name != "_core"} for m in MODULES}
    while True:
        leaves = [m for m, targets in edges.items() if not targets & set(edges)]
        if not leaves:
            break
        for m in leaves:
            del edges[m]
    assert not edges, f"circles among {sorted(edges)}"


# Former modules that became rooms of the same name, and the names in them.
BECAME_ROOMS = {
    "calibration": ["CalibratedModule", "CalibrationReport", "Choice", "Store", "calibrate", "choose_codes"],
    "checkpoint": ["quantize_checkpoint"],
    "cli": ["app", "main"],
    "compat": ["QINSLinear", "install", "main"],
    "files": ["Checkpoint", "StoredTensor", "checksum", "fingerprint", "open_checkpoint", "read_json", "verify"],
    "hf": ["QinsConfig", "QinsHfQuantizer", "attach", "load", "register"],
}


@pytest.mark.parametrize("room", BECAME_ROOMS)
def test_rooms_that_were_modules_have_what_these_had(room):
    module = importlib.import_module(f"qins.{room}")
    assert [n for n in BECAME_ROOMS[room] if not hasattr(module, n)] == []


@pytest.mark.parametrize("old", sorted(_old_paths.MOVED))
def test_old_modules_still_open(old):
    sys.modules.pop(f"qins.{old}", None)
    with pytest.warns(DeprecationWarning, match="has moved to") if old not in _old_paths.PUBLIC else nullcontext():
        module = importlib.import_module(f"qins.{old}")
    for place in _old_paths.MOVED[old]:
        there = importlib.import_module(f"qins.{place}")
        own = [n for n, v in vars(there).items() if getattr(v, "__module__", None) == there.__name__]
        assert own
        for name in own:
            assert getattr(module, name) is getattr(there, name)
    with pytest.raises(AttributeError, match=f"module 'qins.{old}' has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_public_modules_are_attributes():
    code = "import qins; print(qins.ops.set_fused_rows.__name__, qins.rational.QINSWeightLinear.__name__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["set_fused_rows", "QINSWeightLinear"], done.stderr
