"""foveate: keep only the visual tokens that matter, in stock vision-language models."""

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
    "guide",
    "list_families",
    "list_methods",
    "load_reducer",
    "reduce",
    "register",
    "train_gates",
]
