"""A smaller image: what a service can do without any pruning method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import BudgetError, Reducer, Selection, Span, SpanSelection, VisualTokens, grids, register


@register("downsample")
@dataclass(frozen=True)
class Downsample(Reducer):
    """Shrink the image before the encoder, so that fewer patches come out of it.

    Each crop is resized (bicubic, antialiased) to the largest grid of patches near its own shape that fits the
    budget, and encoded with interpolated position embeddings: 32 tokens of a square image make a 5 x 6 grid of 30.

    Parameters
    ----------
    keep
        The budget, an upper limit here.
    """

    stage = "pixels"
    complexity = "O(T)"
    reads_grid = True

    def plan(self, span: Span) -> list[tuple[tuple[int, int], Tensor]]:
        """Return, for each crop, the smaller grid and the positions in the span that its tokens stand for.

        Raises
        ------
        BudgetError
            If there are fewer tokens than crops.
        """
        plans = []
        budgets = grids.crop_budgets(span, self.keep, self.name)
        if not all(count for *_, count in budgets):
            raise BudgetError(
                f"downsample makes a smaller picture of each crop: keep at least {len(budgets)} tokens of an "
                f"{span.kind} of {len(budgets)} crops"
            )
        for crop, grid, count in budgets:
            small = grids.smaller_grid(grid, count)
            rows, columns = (
                torch.tensor([grids.middle(i, n, size) for i in range(n)]) for n, size in zip(small, grid, strict=True)
            )
            plans.append((small, crop.index[(rows[:, None] * grid[1] + columns).flatten()]))
        return plans

    def select(self, tokens: VisualTokens) -> Selection:
        kept = [torch.cat([anchors for _, anchors in self.plan(span)]).sort().values for span in tokens.spans]
        return Selection(
            tuple(
                SpanSelection(len(s), k.to(tokens.device), sample=s.sample, kind=s.kind)
                for s, k in zip(tokens.spans, kept, strict=True)
            )
        )
