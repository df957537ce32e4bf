"""A uniform grid of tokens, and the geometry that the grid baselines share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.reducer import Reducer, register
from foveate.selection import Selection
from foveate.tokens import CropBatch, VisualTokens


def cells(grid: tuple[int, int], count: int) -> list[tuple[range, range]]:
    """Divide a grid into exactly `count` cells of nearly equal size, row by row.

    The grid is cut into bands of rows, and each band into as many columns of cells as the count asks for. As in
    adaptive pooling, cells of a band may share a border row or column.

    Returns
    -------
    list
        The rows and the columns that each cell covers.
    """
    height, width = grid
    bands = min(height, max(1, round((count * height / width) ** 0.5), -(-count // width)))
    result = []
    for i in range(bands):
        columns = (i + 1) * count // bands - i * count // bands
        for j in range(columns):
            result.append((_window(i, bands, height), _window(j, columns, width)))
    return result


def _window(i: int, parts: int, size: int) -> range:
    return range(i * size // parts, -(-(i + 1) * size // parts))


def centres(grid: tuple[int, int], count: int) -> list[int]:
    """Return the raster index of the token nearest to the middle of each of `count` cells; they are distinct."""
    height, width = grid
    bands = cells(grid, count)
    rows = sorted({(r.start, r.stop) for r, _ in bands})
    middle = {r: int((2 * i + 1) * height / (2 * len(rows))) for i, r in enumerate(rows)}
    result = []
    for r in rows:
        columns = sum((a.start, a.stop) == r for a, _ in bands)
        result += [middle[r] * width + int((2 * j + 1) * width / (2 * columns)) for j in range(columns)]
    return result


@register("uniform")
@dataclass(frozen=True)
class Uniform(Reducer):
    """Keep tokens on a uniform grid, whatever the image shows.

    Parameters
    ----------
    keep
        The budget.
    """

    def select(self, tokens: VisualTokens) -> Selection:
        return tokens.per_crop(self.keep, self._pick)

    def _pick(self, crops: CropBatch, count: int) -> Tensor:
        index = torch.tensor(centres(crops.require_grid(self.name), count), device=crops.device)
        return index.expand(len(crops.ordinals), -1)
