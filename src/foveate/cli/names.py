"""Names of methods, found without importing any: a mistyped one is answered before torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from foveate.core.errors import UnknownNameError

_METHODS = Path(__file__).parents[1] / "methods"
_REGISTERED = re.compile(r'^@register\("(.+)"\)$', re.MULTILINE)


def method_names() -> list[str]:
    """Return the names of the methods of this package, read from their sources, and of plugins, sorted."""
    texts = (file.read_text(encoding="utf-8") for file in _METHODS.glob("*.py"))
    own = (name for text in texts for name in _REGISTERED.findall(text))
    return sorted({*own, *(point.name for point in entry_points(group="foveate.reducers"))})


def check_methods(names: Iterable[str]) -> None:
    """Raise `UnknownNameError` if one of these is neither a method's name nor a JSON file's."""
    known = method_names()
    for name in names:
        if name not in known and not name.endswith(".json"):
            raise UnknownNameError.among("no method is called", name, known)
