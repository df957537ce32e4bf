"""foveate: keep only the visual tokens that matter, in stock vision-language models."""

from foveate.budget import Budget
from foveate.engines.attach import attach
from foveate.engines.guide import guide
from foveate.engines.hf import reduce
from foveate.errors import FoveateError
from foveate.families import list_families
from foveate.gate_training import train_gates
from foveate.methods import VisPruner
from foveate.reducer import Chain, Reducer, list_methods, load_reducer, register
from foveate.selection import Selection
from foveate.tokens import VisualTokens

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
