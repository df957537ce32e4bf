"""What a family is like is said in its own file: nothing else names one, or asks which one it has."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import foveate
from foveate.families import all_families

ROOT = Path(foveate.__file__).parent
CLASSES = [type(family) for family in all_families().values()]
FILES = sorted({Path(inspect.getfile(cls)) for cls in CLASSES})
CONCRETE = {cls.__module__ for cls in CLASSES} | {f"foveate.families.{cls.__name__}" for cls in CLASSES}
# What the author of a family imports is shown in author.py.
OTHERS = [
    p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] not in ("families", "nano", "author.py")
]


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports, and what may be one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def asks_for_a_name(node: ast.AST) -> bool:
    """Return whether `family.name` or `config.model_type` is compared with a constant."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    read = [side for side in sides if isinstance(side, ast.Attribute)]
    asked = any(x.attr == "model_type" or (x.attr == "name" and _is_family(x.value)) for x in read)
    return asked and any(isinstance(part, ast.Constant) for side in sides for part in ast.walk(side))


def _is_family(node: ast.AST) -> bool:
    return "family" in ast.unparse(node).lower()


def test_the_checks_find_what_they_look_for() -> None:
    wrong = ast.parse("from foveate.families import llava\nif job.family.name in ('generic', 'llava'): ...")
    assert CONCRETE & set(imported(wrong)) == {"foveate.families.llava"}
    assert CONCRETE & set(imported(ast.parse("from foveate.families import Llava")))
    assert any(map(asks_for_a_name, ast.walk(wrong)))
    assert any(map(asks_for_a_name, ast.walk(ast.parse("model.config.model_type == 'llava_next'"))))


def test_no_other_file_knows_a_family() -> None:
    assert len(OTHERS) > 100
    faults: dict[str, list[str]] = {}
    for path in OTHERS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [*CONCRETE & set(imported(tree)), *(ast.unparse(n) for n in ast.walk(tree) if asks_for_a_name(n))]
        faults.update({str(path.relative_to(ROOT)): found} if found else {})
    assert faults == {}


def test_families_read_nothing_above_them() -> None:
    allowed = ("foveate.core", "foveate.families", "foveate.registry")
    for path in (ROOT / "families").glob("*.py"):
        own = [name for name in imported(ast.parse(path.read_text(encoding="utf-8"))) if name.startswith("foveate")]
        assert [name for name in own if not name.startswith(allowed)] == [], path.name


def test_the_file_of_a_family_is_short() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lengths) > 20
    assert {name: n for name, n in lengths.items() if n > 200} == {}
