"""Average pooling of tokens on the grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.grids import cells, crop_budgets
from foveate.reducer import Reducer, register
from foveate.selection import Merge, Selection, SpanSelection
from foveate.tokens import Span, VisualTokens


@register("pool")
@dataclass(frozen=True)
class Pool(Reducer):
    """Replace each cell of a uniform grid by the mean of its projected tokens (adaptive average pooling).

    Parameters
    ----------
    keep
        The budget: exactly that many cells. Each pooled token sits at the middle of its cell.
    """

    merges = True

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(tuple(self._pool(span, tokens.device) for span in tokens.spans))

    def _pool(self, span: Span, device: torch.device) -> SpanSelection:
        if self.keeps_all([span]):
            kept = torch.cat([crop.index for crop in span.crops]).sort().values
            return SpanSelection(len(span), kept.to(device), sample=span.sample, kind=span.kind)
        anchors, targets, sources, weights, pooled = [], [], [], [], 0
        for crop, grid, count in crop_budgets(span, self.keep, self.name):
            anchor, target, source, weight = _windows(grid, count)
            anchors.append(crop.index[anchor])
            targets.append(target + pooled)
            sources.append(crop.index[source])
            weights.append(weight)
            pooled += len(anchor)
        kept, order = torch.cat(anchors).sort()
        rank = order.argsort()
        merge = Merge(rank[torch.cat(targets)].to(device), torch.cat(sources).to(device), torch.cat(weights).to(device))
        return SpanSelection(len(span), kept.to(device), merge, span.sample, span.kind)


@lru_cache(maxsize=256)
def _windows(grid: tuple[int, int], count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the anchors ``[T]`` of the cells, and the target, source and weight of each token of each cell."""
    parts = cells(grid, count)
    tokens = [[r * grid[1] + c for r in cell.rows for c in cell.columns] for cell in parts]
    sizes = torch.tensor([len(window) for window in tokens])
    return (
        torch.tensor([cell.middle for cell in parts]),
        torch.arange(len(parts)).repeat_interleave(sizes),
        torch.tensor([i for window in tokens for i in window]),
        (1 / sizes).repeat_interleave(sizes),
    )
