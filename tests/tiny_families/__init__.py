"""Tiny random models, one file per family; importing this package lists them all."""

from __future__ import annotations

import importlib
import pkgutil

from tiny_families.base import Tiny, Visual

TINIES: dict[str, Tiny] = {}

for found in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    tiny = getattr(importlib.import_module(f"{__name__}.{found.name}"), "TINY", None)
    if tiny is not None:
        TINIES[tiny.name] = tiny

__all__ = ["TINIES", "Tiny", "Visual"]
