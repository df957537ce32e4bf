"""What the author of a method or a family imports.

The base classes and the data that a method takes and returns are here by name; probes, and helpers for ranking tokens,
for grids, for budgets inside the LLM and for clustering are in the modules of these names. `Family` is here with those
of its kind that others are made from.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from foveate.core import budget, clustering, grids, probes, ranking, schedules
from foveate.core.budget import Budget, Coverage, Keep
from foveate.core.checks import checked_values
from foveate.core.crops import CropBatch, Groups
from foveate.core.encoder import EncoderReducer, Inside
from foveate.core.errors import (
    BudgetError,
    ContractError,
    FoveateError,
    InputError,
    UnknownNameError,
    UnsupportedModelError,
)
from foveate.core.in_llm import InLlmReducer, LayerTokens, StagedReducer
from foveate.core.reducer import CropMerger, CropReducer, Method, ModelFamily, Reducer
from foveate.core.schedules import Images
from foveate.core.selection import Merge, Selection, SpanSelection
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.registry import register

if TYPE_CHECKING:
    from foveate.families.base import Family
    from foveate.families.batches import joined_outputs
    from foveate.families.layout import Grid, Layout
    from foveate.families.llava import Llava
    from foveate.families.merged import MergedFamily
    from foveate.families.mrope import MRopeFamily
    from foveate.families.raster import RasterFamily
    from foveate.families.registry import register_family
    from foveate.families.tiled import TiledFamily
    from foveate.families.tower import resized

__all__ = [
    "Budget",
    "BudgetError",
    "ContractError",
    "Coverage",
    "Crop",
    "CropBatch",
    "CropMerger",
    "CropReducer",
    "EncoderReducer",
    "Family",
    "FoveateError",
    "Grid",
    "Groups",
    "Images",
    "InLlmReducer",
    "InputError",
    "Inside",
    "Keep",
    "LayerTokens",
    "Layout",
    "Llava",
    "MRopeFamily",
    "Merge",
    "MergedFamily",
    "Method",
    "ModelFamily",
    "RasterFamily",
    "Reducer",
    "Selection",
    "Span",
    "SpanSelection",
    "StagedReducer",
    "TiledFamily",
    "UnknownNameError",
    "UnsupportedModelError",
    "VisualTokens",
    "budget",
    "checked_values",
    "clustering",
    "grids",
    "joined_outputs",
    "probes",
    "ranking",
    "register",
    "register_family",
    "resized",
    "schedules",
]

_FAMILIES = {
    "Family": "base",
    "Grid": "layout",
    "Layout": "layout",
    "Llava": "llava",
    "MRopeFamily": "mrope",
    "MergedFamily": "merged",
    "RasterFamily": "raster",
    "TiledFamily": "tiled",
    "joined_outputs": "batches",
    "register_family": "registry",
    "resized": "tower",
}


def __getattr__(name: str) -> Any:
    """Import what families are made of when it is asked for: the author of a method needs no model classes."""
    if name not in _FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"foveate.families.{_FAMILIES[name]}"), name)
