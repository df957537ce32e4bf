"""What a search chooses from: methods by budgets, as far as the model's family runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from foveate.core.budget import Keep, parse_keep
from foveate.core.errors import FoveateError, InputError, UnknownNameError
from foveate.core.reducer import Method
from foveate.families import Family
from foveate.registry import get_method, load_reducer, parameters_without_default

CONTROLS: Final = ("random", "uniform", "pool")
"""Always among the candidates: a method that does not beat them is not worth its name."""

METHODS: Final = (
    "vispruner", "visionzip", "fastervlm", "hiprune", "divprune", "cdpruner", "scope", "dart", "tome", "downsample",
    "fastv", "pyramiddrop",
)  # fmt: skip
"""Tried unless others are named: by attention, by diversity, by relevance to the question, by merging, by smaller
pictures, and inside the LLM."""

BUDGETS: Final = ("0.75", "0.5", "0.33", "0.2", "0.1")


def candidates(
    family: Family, methods: Sequence[str] = METHODS, budgets: Sequence[str] = BUDGETS
) -> tuple[dict[str, Method], dict[str, str]]:
    """Return the candidates for a family by the text that reports call them, and what is left out, with the reason.

    Parameters
    ----------
    methods
        Names, or JSON files that hold a method with its budget and further parameters.
    budgets
        As the command line takes them, for all methods that are named.

    Raises
    ------
    InputError
        If none is left beside the controls.
    UnknownNameError
        If there is no method of a name.
    """
    keeps: dict[str, Keep] = {text.strip(): parse_keep(text) for text in budgets}
    found: dict[str, Method] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys([*methods, *CONTROLS]):
        if name.endswith(".json"):
            _add(found, left_out, name, name, family, load_reducer(name))
            continue
        if more := parameters_without_default(name):
            left_out[name] = f"it must be given {', '.join(more)}: write a JSON file with them"
            continue
        if name == "chain" or get_method(name).video_only:
            left_out[name] = "a chain is given as a JSON file" if name == "chain" else "it leaves images alone"
            continue
        for text, keep in keeps.items():
            try:
                reducer = load_reducer(name, keep=keep)
            except UnknownNameError:
                raise
            except FoveateError as error:
                left_out[f"{name} {text}"] = str(error)
                continue
            _add(found, left_out, f"{name} {text}", name, family, reducer)
    if not any(key.split()[0] not in CONTROLS for key in found):
        reasons = "; ".join(f"{key}: {reason}" for key, reason in left_out.items()) or "only controls are named"
        raise InputError(f"no method is left to try on the family {family.name!r}: {reasons}")
    return found, left_out


def _add(
    found: dict[str, Method], left_out: dict[str, str], key: str, name: str, family: Family, reducer: Method
) -> None:
    if lacking := family.lacks(reducer):
        left_out[name] = f"it needs {lacking}, which the family {family.name!r} does not give"
    elif reducer.stage == "projector":
        left_out[name] = "it acts at the stage 'projector', which needs a model of its own"
    elif reducer.guided:
        left_out[name] = "it needs a second model to guide this one, see foveate.guide"
    else:
        found[key] = reducer
