"""Adaptive budgets: how many tokens hold a share of an image's saliency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foveate.core.ambient import neutral
from foveate.core.budget import Coverage
from foveate.core.probes import Attention
from foveate.core.tokens import VisualTokens

SALIENCY = Attention()
_NOISE = 1e-9  # relative: equal tokens, of which a tenth hold a tenth, must not need one more in double precision


@torch.no_grad()
@neutral()
def with_coverage(tokens: VisualTokens, budgets: Sequence[Coverage]) -> VisualTokens:
    """Work out how many tokens each adaptive budget comes to in each crop, and note it in the spans.

    Waits for the device once per budget and span: the counts decide the shapes of all that follows.
    """
    saliency, spans, first = tokens.probe(SALIENCY), [], 0
    for span in tokens.spans:
        own = [x.float().clamp(min=0).nan_to_num(0.0) for x in saliency[first : first + len(span.crops)]]
        covered = {budget: _counts(own, budget) for budget in budgets}
        spans.append(replace(span, covered={**span.covered, **covered}))
        first += len(span.crops)
    return replace(tokens, spans=tuple(spans))


def _counts(saliency: Sequence[Tensor], budget: Coverage) -> tuple[int, ...]:
    if budget.per == "crop":
        chosen = [_top(x, budget) for x in saliency]
    else:
        chosen = list(torch.split(_top(torch.cat(list(saliency)), budget), [len(x) for x in saliency]))
    return tuple(torch.stack([part.sum() for part in chosen]).tolist())


def _top(saliency: Tensor, budget: Coverage) -> Tensor:
    """Mark the fewest tokens ``[N]`` that hold the budget's share, within its bounds."""
    if not len(saliency):
        return saliency.bool()
    order = saliency.argsort(descending=True, stable=True)
    mass = saliency[order].double().cumsum(0)
    needed = 1 + (mass < budget.value * (1 - _NOISE) * mass[-1]).sum()
    count = needed.clamp(budget.least, budget.most).clamp(max=len(saliency))
    return torch.zeros_like(order, dtype=torch.bool).index_put(
        (order,), torch.arange(len(order), device=order.device) < count
    )
