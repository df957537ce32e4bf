"""How images and videos are laid out as tokens, and where the tiles of a picture lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from foveate.core.spans import Crop, Span

Grid = tuple[int, int]
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Layout:
    """One image or video of the inputs, before it is known in which prompt it stands.

    Attributes
    ----------
    length
        Its number of visual tokens.
    grid
        Frames or crops, rows, columns.
    crops
        What methods select from; `Crop.encoder_row` counts what the encoder sees of all images of the kind.
    extents
        See `Span.extents`.
    """

    length: int
    grid: tuple[int, int, int]
    crops: tuple[Crop, ...]
    extents: tuple[tuple[int, int], ...] = ()


def crop_layout(grid: Grid, row: int, boxes: Sequence[Box | None]) -> Layout:
    """Lay out crops of equal grids and given boxes, of which the first is row `row` of the encoder."""
    size = math.prod(grid)
    crops = tuple(
        Crop(torch.arange(i * size, (i + 1) * size), grid, box, encoder_row=row + i) for i, box in enumerate(boxes)
    )
    return Layout(len(boxes) * size, (len(boxes), *grid), crops)


def tile_boxes(tiles: int, overview: Literal["first", "last"], arranged: Grid | None) -> list[Box | None]:
    """Return where the tiles of a picture lie, the overview among them; `None` where that is not known."""
    if tiles == 1:
        return [WHOLE]
    boxes: list[Box | None] = [None] * (tiles - 1)
    if arranged is not None and math.prod(arranged) == tiles - 1:
        rows, columns = arranged
        boxes = [
            (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)
        ]
    return [WHOLE, *boxes] if overview == "first" else [*boxes, WHOLE]


def nearest_arrangement(tiles: int, aspect: float) -> Grid:
    """Return the rows and columns of so many tiles that come closest to a picture's width divided by its height."""
    shapes = [(rows, tiles // rows) for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] / aspect)))


def located(spans: Sequence[Span], size: tuple[int, int], overview: Literal["first", "last"]) -> tuple[Span, ...]:
    """Return the spans of pictures of a size ``(height, width)`` with the boxes of their tiles.

    Of the arrangements of so many tiles, processors take the one that is closest to the picture's shape.
    """
    height, width = size
    found = []
    for span in spans:
        if any(crop.box is None for crop in span.crops):
            arranged = nearest_arrangement(len(span.crops) - 1, width / height)
            boxes = tile_boxes(len(span.crops), overview, arranged)
            crops = tuple(replace(crop, box=box) for crop, box in zip(span.crops, boxes, strict=True))
            span = replace(span, crops=crops)
        found.append(span)
    return tuple(found)


def frames_layout(grid: Grid, frames: int, lead: int = 0) -> Layout:
    """Lay out frames of a grid, each with some tokens before it that belong to no crop."""
    size = lead + math.prod(grid)
    crops = tuple(Crop(torch.arange(f * size + lead, (f + 1) * size), grid, encoder_row=f) for f in range(frames))
    extents = tuple((f * size + lead, (f + 1) * size) for f in range(frames) if lead)
    return Layout(frames * size, (frames, *grid), crops, extents)
