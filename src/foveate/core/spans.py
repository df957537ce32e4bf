"""Where visual tokens are: the spans of a prompt, and the crops that a span is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foveate.core.budget import Coverage, Keep, resolve


@dataclass(frozen=True, eq=False)
class Crop:
    """A part of a span that went through the vision encoder by itself: an image, a tile, a frame.

    Attributes
    ----------
    index
        ``[n]`` int64 on the CPU: where the crop's tokens lie in the span, ascending.
    grid
        Rows and columns of its tokens, ``h * w == n``; `None` if unknown, or once an earlier method has thinned it
        out.
    box
        Left, top, right, bottom of the crop in the image, as shares of its width and height; `None` for a tile where
        the inputs do not tell how tiles are arranged (see `Family.located`).
    offset
        First row and column of `grid` in the encoder's own grid (not zero where padding was cut off).
    encoder_row
        Which row of the encoder's batch it is.
    cells
        ``[n, 2]`` int64 on the CPU: row and column of each token in the grid that an earlier method has thinned out;
        `None` while `grid` tells them, or if they are unknown.
    """

    index: Tensor
    grid: tuple[int, int] | None
    box: tuple[float, float, float, float] | None = (0.0, 0.0, 1.0, 1.0)
    offset: tuple[int, int] = (0, 0)
    encoder_row: int = 0
    cells: Tensor | None = None

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def places(self) -> Tensor | None:
        """Return the row and the column of each token, ``[n, 2]`` int64 on the CPU, or `None` if they are unknown."""
        if self.grid is None:
            return self.cells
        return torch.cartesian_prod(torch.arange(self.grid[0]), torch.arange(self.grid[1]))

    def thinned(self, rank: Tensor, index: Tensor) -> Crop:
        """Return the crop with some of its tokens ``[k]`` alone, which now lie at `index` ``[k]``."""
        if len(rank) == len(self):
            return replace(self, index=index)
        cells = self.places()
        return replace(self, index=index, grid=None, cells=None if cells is None else cells.index_select(0, rank))


@dataclass(frozen=True, eq=False)
class Span:
    """The run of visual tokens of one image, tile set or video in one prompt.

    Attributes
    ----------
    kind
        ``"image"`` or ``"video"``.
    sample
        Row of the batch.
    ordinal
        Which span of its prompt it is, from 0.
    columns
        ``[N]`` int64 on the CPU: the columns of ``input_ids`` that hold its placeholders.
    grid
        Frames or crops, rows, columns: ``(t, h, w)``.
    crops
        The parts that methods select from. Tokens in no crop are separators (newline vectors, a frame's ``[CLS]``).
    extents
        For each separator, the first and the last + 1 of the tokens in the span that it belongs to (a row, a frame).
    covered
        Tokens per crop that adaptive budgets come to for this image, once its saliency is known.
    """

    kind: str
    sample: int
    ordinal: int
    columns: Tensor
    grid: tuple[int, int, int]
    crops: tuple[Crop, ...]
    extents: tuple[tuple[int, int], ...] = ()
    covered: Mapping[Coverage, tuple[int, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.columns.shape[0])

    def separators(self) -> Tensor:
        """Return the positions of tokens that belong to no crop, ``[S]`` int64 ascending."""
        free = torch.ones(len(self), dtype=torch.bool)
        for crop in self.crops:
            free[crop.index] = False
        return free.nonzero().flatten()

    def budget(self, keep: Keep) -> list[int]:
        """Return how many tokens `keep` leaves in each crop; a single number for all with a joint budget."""
        sizes = [len(crop) for crop in self.crops]
        budget = resolve(keep, self.kind, self.ordinal)
        if isinstance(budget, Coverage):
            if budget not in self.covered:
                budget.count(len(self))  # raises
            counts = self.covered[budget]
            return [sum(counts)] if budget.per == "joint" else list(counts)
        return [budget.count(sum(sizes))] if budget.per == "joint" else budget.split(sizes)
