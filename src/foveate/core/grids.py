"""Geometry of token grids: dividing them into cells, and moving scores from one to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.core.budget import Keep, resolve
from foveate.core.errors import InputError
from foveate.core.spans import Crop, Span


@dataclass(frozen=True)
class Cell:
    """A rectangle of tokens, and the raster index of the one in its middle."""

    rows: range
    columns: range
    middle: int


@lru_cache(maxsize=1024)
def cells(grid: tuple[int, int], count: int) -> tuple[Cell, ...]:
    """Divide a grid ``(h, w)`` into exactly `count` cells of nearly equal size, row by row.

    The grid is cut into bands of rows, and each band into as many columns as the count asks for. As in adaptive
    pooling, neighbouring cells may share a border row or column; their middles are distinct.
    """
    height, width = grid
    bands = round((count * height / width) ** 0.5)
    bands = min(max(bands, -(-count // width), 1), height, count)
    result = []
    for i in range(bands):
        parts = (i + 1) * count // bands - i * count // bands
        row = middle(i, bands, height)
        for j in range(parts):
            anchor = row * width + middle(j, parts, width)
            result.append(Cell(_window(i, bands, height), _window(j, parts, width), anchor))
    return tuple(result)


def smaller_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Return the grid of at most `count` tokens that has the most of them at nearly the shape of `grid`.

    Nearly means an aspect ratio within a factor of 1.5; where no grid is that close, the closest one is taken.
    """
    height, width = grid
    fitting = [(h, min(width, count // h)) for h in range(1, min(height, count) + 1)]

    def skew(shape: tuple[int, int]) -> float:
        ratio = (shape[0] * width) / (shape[1] * height)
        return max(ratio, 1 / ratio)

    allowed = max(1.5, min(map(skew, fitting)))
    return sorted((s for s in fitting if skew(s) <= allowed), key=lambda s: (-s[0] * s[1], skew(s)))[0]


def middle(i: int, parts: int, size: int) -> int:
    """Return the index in the middle of part `i` when `size` indices are divided into `parts`."""
    return (2 * i + 1) * size // (2 * parts)


def _window(i: int, parts: int, size: int) -> range:
    return range(i * size // parts, -(-(i + 1) * size // parts))


def crop_budgets(span: Span, keep: Keep, method: str) -> Sequence[tuple[Crop, tuple[int, int], int]]:
    """Return each crop of a span with its grid and its budget.

    Raises
    ------
    InputError
        If the budget is joint, an earlier method has thinned out the grid, or the family does not know it.
    """
    if resolve(keep, span.kind, span.ordinal).per == "joint":
        raise InputError(f"{method} works on the grid of each crop: use a budget per 'image' or per 'crop'")
    result = []
    for crop, count in zip(span.crops, span.budget(keep), strict=True):
        if crop.grid is None:
            raise InputError(
                f"{method} needs the whole token grid: put it first in the chain, and use a model whose family knows it"
            )
        result.append((crop, crop.grid, count))
    return result


def resampled(scores: Tensor, span: Span, other: Span) -> Tensor:
    """Move scores ``[N]`` of a span's tokens to those of another span that shows the same, crop by crop, bilinearly.

    Tokens of the other span in no crop get zero.

    Raises
    ------
    InputError
        If the grid of a crop is not known.
    """
    if (span.grid, len(span)) == (other.grid, len(other)):
        return scores
    out = scores.new_zeros(len(other))
    for crop, target in zip(span.crops, other.crops, strict=True):
        if crop.grid is None or target.grid is None:
            raise InputError("scores can only be moved between token grids, and that of an image is not known")
        plane = scores[crop.index.to(scores.device)].reshape(1, 1, *crop.grid)
        moved = torch.nn.functional.interpolate(plane, size=target.grid, mode="bilinear", align_corners=False)
        out[target.index.to(out.device)] = moved.flatten()
    return out
