"""foveate: keep only the visual tokens that matter, in stock vision-language models."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.core.budget import Budget
    from foveate.core.errors import FoveateError
    from foveate.core.reducer import Reducer
    from foveate.core.selection import Selection
    from foveate.core.tokens import VisualTokens
    from foveate.engines.transformers.attach import attach
    from foveate.engines.transformers.reduce import reduce
    from foveate.families import list_families
    from foveate.fit.gates import train_gates
    from foveate.guided.guide import guide
    from foveate.methods import VisPruner
    from foveate.methods.chain import Chain
    from foveate.projectors.install import from_pretrained, install_projector
    from foveate.registry import list_methods, load_reducer, register

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Chain",
    "FoveateError",
    "Reducer",
    "Selection",
    "VisPruner",
    "VisualTokens",
    "attach",
    "from_pretrained",
    "guide",
    "install_projector",
    "list_families",
    "list_methods",
    "load_reducer",
    "reduce",
    "register",
    "train_gates",
]

_HOMES = {
    "Budget": "core.budget",
    "Chain": "methods.chain",
    "FoveateError": "core.errors",
    "Reducer": "core.reducer",
    "Selection": "core.selection",
    "VisPruner": "methods",
    "VisualTokens": "core.tokens",
    "attach": "engines.transformers.attach",
    "from_pretrained": "projectors.install",
    "guide": "guided.guide",
    "install_projector": "projectors.install",
    "list_families": "families",
    "list_methods": "registry",
    "load_reducer": "registry",
    "reduce": "engines.transformers.reduce",
    "register": "registry",
    "train_gates": "fit.gates",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: all at once would load torch and transformers for `foveate --help` too."""
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")  # such as `foveate.methods`
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
