"""Scores of visual tokens that a method inside the LLM reads there, and that come from in front of it.

They are a method's own, made of what the vision encoder shows (`priors_of`), or somebody else's (`priors_from_scores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.ambient import neutral
from foveate.core.errors import InputError
from foveate.core.in_llm import InLlmReducer
from foveate.core.selection import Selection
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens


@neutral()
def priors_of(reducers: Sequence[Any], tokens: VisualTokens, selection: Selection) -> dict[InLlmReducer, list[Tensor]]:
    """Return what methods inside the LLM make of the tokens before it, ``[K]`` per span of those that are left.

    Separators, of which no method judges, get infinity.
    """
    remaining, priors = tokens.after(selection), {}
    for reducer in reducers:
        values, scores = iter(reducer.prior(remaining)), []
        for span, chosen in zip(remaining.spans, selection, strict=True):
            full = torch.full((len(span),), torch.inf, device=chosen.kept.device)
            for crop in span.crops:
                full[crop.index.to(full.device)] = next(values).float()
            scores.append(full.index_select(0, chosen.kept))
        priors[reducer] = scores
    return priors


def check_scores(scores: Sequence[Any]) -> None:
    """Raise `InputError` unless scores are one real tensor ``[n]`` per prompt with images, none of them NaN."""
    for i, row in enumerate(scores):
        if not isinstance(row, Tensor) or row.dim() != 1 or row.is_complex():
            what = f"a tensor of shape {tuple(row.shape)}" if isinstance(row, Tensor) else f"a {type(row).__name__}"
            raise InputError(f"scores are one real tensor [n] per prompt with images, but [{i}] is {what}")
        if row.isnan().any():
            raise InputError(f"scores [{i}] of a prompt with images have NaN, which has no rank: pass numbers")


def priors_from_scores(
    reducers: Sequence[InLlmReducer], scores: Sequence[Tensor], spans: Sequence[Span], kept: Selection | None
) -> dict[InLlmReducer, list[Tensor]]:
    """Return scores of prompts ``[n]`` as priors of some methods: per span, of the tokens that are left.

    Raises
    ------
    InputError
        If there is not one score for each visual token of the full prompts.
    """
    rows: dict[int, list[int]] = {}
    for span in spans:
        rows.setdefault(span.sample, []).append(len(span))
    if [len(x) for x in scores] != [sum(lengths) for lengths in rows.values()]:
        raise InputError(
            f"scores for {[len(x) for x in scores]} visual tokens, but the prompts with images have "
            f"{[sum(lengths) for lengths in rows.values()]}: pass one score per visual token"
        )
    parts = [part.float() for x, lengths in zip(scores, rows.values(), strict=True) for part in torch.split(x, lengths)]
    if kept is not None:
        parts = [chosen.anchors(part) for part, chosen in zip(parts, kept, strict=True)]
    return dict.fromkeys(reducers, parts)
