"""Average pooling of tokens on the grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.author import CropBatch, CropMerger, Groups, grids, register


@register("pool")
@dataclass(frozen=True)
class Pool(CropMerger):
    """Replace each cell of a uniform grid by the mean of its projected tokens (adaptive average pooling).

    Parameters
    ----------
    keep
        The budget: exactly that many cells. Each pooled token sits at the middle of its cell.
    """

    merges = "embeddings"
    complexity = "O(N)"
    reads_grid = True

    def pick(self, crops: CropBatch, count: int) -> Groups:
        windows = _windows(crops.require_grid(self.name), count)
        return Groups(*(x.to(crops.device, non_blocking=True).expand(len(crops.ordinals), -1) for x in windows))


@lru_cache(maxsize=256)
def _windows(grid: tuple[int, int], count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the anchors ``[T]`` of the cells, and the target, source and weight of each token of each cell."""
    parts = grids.cells(grid, count)
    tokens = [[r * grid[1] + c for r in cell.rows for c in cell.columns] for cell in parts]
    sizes = torch.tensor([len(window) for window in tokens])
    return (
        torch.tensor([cell.middle for cell in parts]),
        torch.arange(len(parts)).repeat_interleave(sizes),
        torch.tensor([i for window in tokens for i in window]),
        (1 / sizes).repeat_interleave(sizes),
    )
