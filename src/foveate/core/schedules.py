"""Where methods of several stages drop tokens, and how a budget is divided among the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from foveate.core.budget import Budget, Coverage, Keep
from foveate.core.errors import BudgetError, FoveateError


def after_shares(depth: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return the boundaries at some shares of the depth, rounded, as far as they are between two layers."""
    return tuple(dict.fromkeys(b for share in shares if 0 < (b := round(depth * share)) < depth))


def falling(depth: int, boundaries: Sequence[int], given: int, wanted: float, name: str) -> list[int]:
    """Return the tokens behind each boundary, each the same factor times those before, that have a mean over layers.

    Parameters
    ----------
    given
        Tokens in front of the first boundary.
    wanted
        Tokens that the layers receive on average, before counts are rounded (half to even).

    Raises
    ------
    BudgetError
        If the layers in front of the first boundary alone receive more.
    """
    widths = [after - before for before, after in pairwise((0, *boundaries, depth))]
    if given * widths[0] > depth * wanted:
        raise BudgetError(
            f"{name} cannot come down to {wanted:g} tokens per layer: the first {widths[0]} of {depth} layers alone "
            f"receive {given * widths[0] / depth:g} on average; keep more, or use earlier layers"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(width * given * middle**stage for stage, width in enumerate(widths)) / depth
        low, high = (middle, high) if mean < wanted else (low, middle)
    return [round(given * high**stage) for stage in range(1, len(widths))]


def check_layers(name: str, layers: Sequence[int]) -> tuple[int, ...]:
    """Return layers as a tuple, or raise `FoveateError` unless they ascend from 1 on."""
    given = tuple(layers) if isinstance(layers, Sequence) else ()
    if not given or any(type(b) is not int or b <= a for a, b in pairwise((0, *given))):
        raise FoveateError(f"the layers of {name} ascend from 1 on, in whole numbers, not {given or layers!r}")
    return given


def staged_budgets(name: str, keep: Keep, first: Mapping[str, float]) -> tuple[Keep, Keep]:
    """Divide a mean over layers into the budget of the stage before the LLM and the mean of those inside.

    Parameters
    ----------
    first
        How many times the budget the stage before the LLM keeps, by kind of span.

    Returns
    -------
    tuple
        Budgets in the form of `keep`, or by kind for a single one. The second counts per image where `keep` does, and
        else is a share of what the LLM is given.
    """
    if isinstance(keep, Mapping):
        pairs = {kind: _staged(name, value, first[kind]) for kind, value in keep.items()}
        return {kind: pair[0] for kind, pair in pairs.items()}, {kind: pair[1] for kind, pair in pairs.items()}
    if isinstance(keep, Sequence):
        listed = [_staged(name, value, first["image"]) for value in keep]
        return [pair[0] for pair in listed], [pair[1] for pair in listed]
    return staged_budgets(name, dict.fromkeys(first, keep), first)


def _staged(name: str, keep: int | float | Budget, factor: float) -> tuple[Budget, Budget]:
    budget = keep if isinstance(keep, Budget) else Budget(keep)
    if isinstance(budget, Coverage):
        raise BudgetError(f"{name} divides its budget among layers and needs a count or a ratio, not {budget!r}")
    if isinstance(budget.value, float):
        value: int | float = min(1.0, factor * budget.value)
        return replace(budget, value=value), Budget(budget.value / value)
    value = round(factor * budget.value)
    return replace(budget, value=value), Budget(budget.value / value if budget.per == "crop" else budget.value)
