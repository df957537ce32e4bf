"""Where methods of several stages drop tokens, and how a budget is divided among the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

from foveate.core.budget import Budget, Coverage, Keep, is_number, resolve
from foveate.core.errors import BudgetError, FoveateError, UnsupportedModelError

Images: TypeAlias = Sequence[tuple[str, int]]
"""The kind and the number of tokens of each image or video of a prompt."""


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


def boundary_in(depth: int, boundary: int, name: str) -> int:
    """Return a boundary if the LLM has it.

    Raises
    ------
    UnsupportedModelError
        If it is not between two of `depth` layers.
    """
    if not 0 < boundary < depth:
        raise UnsupportedModelError(
            f"{name} drops tokens in front of layer {boundary}, but this LLM has the layers 0 to {depth - 1}: use a "
            f"layer from 1 to {depth - 1}"
        )
    return boundary


def budget_of(keep: Keep, images: Images) -> int:
    """Return how many tokens a budget leaves of the images of a prompt together.

    Raises
    ------
    BudgetError
        If the budget counts per crop.
    """
    budgets = [resolve(keep, kind, i) for i, (kind, _) in enumerate(images)]
    if any(budget.per == "crop" for budget in budgets):
        raise BudgetError("inside the LLM the tokens of all crops compete: give a budget per image, not per crop")
    return sum(budget.count(n) for budget, (_, n) in zip(budgets, images, strict=True))


def tokens_of(images: Images) -> int:
    """Return how many tokens the images of a prompt have together."""
    return sum(n for _, n in images)


def wanted_tokens(equivalent: int | float, images: Images) -> float:
    """Return the mean number of tokens per layer that an `equivalent` stands for: so many per image, or a share."""
    return equivalent * (tokens_of(images) if isinstance(equivalent, float) else len(images))


def one_cut(
    name: str, keep: Keep | None, equivalent: int | float | None, layer: int, depth: int, images: Images
) -> int:
    """Return how many tokens a method with a single cut in front of `layer` leaves of the images of a prompt.

    Raises
    ------
    BudgetError
        If the layers in front of the cut alone exceed the mean that `equivalent` asks for, or `keep` says otherwise.
    """
    if equivalent is None:
        assert keep is not None
        return budget_of(keep, images)
    given, wanted = tokens_of(images), wanted_tokens(equivalent, images)
    kept = round((depth * wanted - given * layer) / (depth - layer))
    if keep is not None and budget_of(keep, images) != min(kept, given):
        raise BudgetError(
            f"{name}: keep={keep!r} and equivalent={equivalent:g} contradict each other, as the latter leaves {kept} "
            f"of {given} tokens: leave one of them out"
        )
    if kept < 1:
        raise BudgetError(
            f"{name}(layer={layer}) cannot come down to {wanted:g} tokens per layer: the first {layer} of {depth} "
            f"layers alone receive {given * layer / depth:g} on average; use an earlier layer"
        )
    return min(kept, given)


def check_equivalent(name: str, keep: Keep | None, equivalent: int | float | None) -> None:
    """Raise `FoveateError` unless a method has either of `keep` and `equivalent`, and the latter makes sense."""
    if keep is None and equivalent is None:
        raise FoveateError(f"{name} needs a budget: keep=, or equivalent=, the mean number of tokens over the layers")
    if equivalent is None:
        return
    if not is_number(equivalent) or equivalent <= 0:
        raise BudgetError(f"equivalent is a mean number of tokens such as 64 or a share such as 0.25: {equivalent!r}")
    if isinstance(equivalent, float) and equivalent > 1.0:
        raise BudgetError(f"a share of {equivalent} is not in (0, 1]: pass a share such as 0.25, or a whole number")
