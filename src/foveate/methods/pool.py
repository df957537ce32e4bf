"""Average pooling of tokens on the grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.methods.uniform import cells, centres
from foveate.reducer import Reducer, register
from foveate.selection import Merge, Selection
from foveate.tokens import CropBatch, VisualTokens


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
        chosen = tokens.per_crop(self.keep, self._pick)
        spans = []
        for span, kept in zip(tokens.spans, chosen, strict=True):
            targets, sources, weights, rank = [], [], [], {int(p): i for i, p in enumerate(kept.kept.tolist())}
            for crop, count in zip(span.crops, span.budget(self.keep), strict=True):
                index = crop.index.tolist()
                assert crop.grid is not None
                whole = count >= len(crop)
                windows = [[i] for i in range(len(crop))] if whole else _windows(crop.grid, count)
                anchors = range(len(crop)) if whole else centres(crop.grid, count)
                for anchor, window in zip(anchors, windows, strict=True):
                    targets += [rank[index[anchor]]] * len(window)
                    sources += [index[i] for i in window]
                    weights += [1 / len(window)] * len(window)
            merge = Merge(
                torch.tensor(targets), torch.tensor(sources), torch.tensor(weights, dtype=torch.float32)
            )  # fmt: skip
            spans.append(replace(kept, merge=merge))
        return Selection(tuple(spans))

    def _pick(self, crops: CropBatch, count: int) -> Tensor:
        index = torch.tensor(centres(crops.require_grid(self.name), count), device=crops.device)
        return index.expand(len(crops.ordinals), -1)


def _windows(grid: tuple[int, int], count: int) -> list[list[int]]:
    return [[r * grid[1] + c for r in rows for c in columns] for rows, columns in cells(grid, count)]
