"""What the author of a method imports.

The base classes and the data that a method takes and returns are here by name; probes, and helpers for ranking tokens,
for grids, for budgets inside the LLM and for clustering are in the modules of these names.
"""

from __future__ import annotations

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
    "FoveateError",
    "Groups",
    "Images",
    "InLlmReducer",
    "InputError",
    "Inside",
    "Keep",
    "LayerTokens",
    "Merge",
    "Method",
    "ModelFamily",
    "Reducer",
    "Selection",
    "Span",
    "SpanSelection",
    "StagedReducer",
    "UnknownNameError",
    "UnsupportedModelError",
    "VisualTokens",
    "budget",
    "checked_values",
    "clustering",
    "grids",
    "probes",
    "ranking",
    "register",
    "schedules",
]
