"""The house: what imports what, and how large its rooms are."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "foveate"
FLOORS = (
    ("cli",),
    ("measure", "cost", "bench", "eval", "tune", "viz", "nano", "guided", "fit", "check"),
    ("engines",),
    ("methods", "projectors"),
    ("author",),
    ("families",),
    ("registry",),
    ("core",),
)
"""From the top down: a module imports from its own floor and those below it."""
MODULES = {
    ".".join(("foveate", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(name: str) -> Iterator[str]:
    """Yield the modules of this package that one imports, for type checkers alone and inside functions, too."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


MODULES_OF_METHODS = {name for name in MODULES if name.startswith("foveate.methods")}
GRAPH = {name: set(imported(name)) - {name} for name in MODULES}


def circles() -> list[list[str]]:
    """Return the sets of modules that import each other, by way of others or not (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(GRAPH[name]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            cut = stack.index(name)
            found.append(stack[cut:])
            del stack[cut:]

    for name in GRAPH:
        if name not in order:
            visit(name)
    return [circle for circle in found if len(circle) > 1]


def floor(name: str) -> int | None:
    room = name.split(".")[1] if "." in name else None  # the package itself shows what all floors have
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)


def test_no_modules_import_each_other():
    assert circles() == []


def test_imports_point_downwards():
    up = [(name, other) for name in GRAPH for other in GRAPH[name] if _above(floor(other), floor(name))]
    assert up == []


def _above(there: int | None, here: int | None) -> bool:
    return here is not None and there is not None and there < here


def test_every_room_has_a_floor():
    assert {name for name in MODULES if name.count(".") and floor(name) is None} <= {"foveate.__main__"}


def test_nothing_imports_the_package_itself():
    """It shows names of all floors, so whatever imports it stands above them, as the command line does."""
    assert {name for name in GRAPH if "foveate" in GRAPH[name] and floor(name) != 0} <= {"foveate.__main__"}


def test_the_core_knows_no_transformers():
    for name, tree in TREES.items():
        if name.startswith(("foveate.core", "foveate.registry", "foveate.author", "foveate.methods")) or name in (
            "foveate.engines.pipeline", "foveate.engines.settings",
        ):  # fmt: skip
            modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert not {module for module in modules if module.split(".")[0] == "transformers"}, name


def test_the_top_has_at_most_twenty_entries():
    assert len([path for path in SOURCE.iterdir() if path.name != "__pycache__"]) <= 20


@pytest.mark.parametrize("name", MODULES)
def test_no_file_and_no_class_is_long(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < 250, node.name


def test_a_method_imports_from_one_place():
    counts = []
    for name in MODULES:
        if name.startswith("foveate.methods."):
            nodes = [node for node in TREES[name].body if isinstance(node, ast.ImportFrom)]
            own = [x for x in nodes if (x.module or "").startswith("foveate") and x.module not in MODULES_OF_METHODS]
            counts.append(sum(len(node.names) for node in own))
            modules = {node.module for node in own} - {"foveate.author"}
            assert len(modules) <= 1 or name == "foveate.methods.chain", name
    assert statistics.median(counts) <= 6
