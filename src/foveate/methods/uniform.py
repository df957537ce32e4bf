"""A uniform grid of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, grids, register


@register("uniform")
@dataclass(frozen=True)
class Uniform(CropReducer):
    """Keep tokens on a uniform grid, whatever the image shows.

    Parameters
    ----------
    keep
        The budget.
    """

    complexity = "O(T)"
    reads_grid = True

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        middles = [cell.middle for cell in grids.cells(crops.require_grid(self.name), count)]
        return torch.tensor(middles).to(crops.device, non_blocking=True).expand(len(crops.ordinals), -1)
