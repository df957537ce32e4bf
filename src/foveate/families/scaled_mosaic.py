"""Mosaics of LLaVA-OneVision, scaled down if they are large: which tokens belong to which tile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from foveate.core.spans import Crop
from foveate.families.layout import Grid, Layout
from foveate.families.mosaic import mosaic, side_of, tiles_of, unpadded


@dataclass(frozen=True, eq=False)
class Picture:
    """Rows and columns of tiles, of the patches that show the picture, of their tokens; `plain` are unscaled crops."""

    tiles: Grid
    rows: tuple[int, int]
    columns: tuple[int, int]
    shape: Grid
    plain: tuple[Crop, ...]
    layout: Layout


def pictures_of(model: Any, inputs: Mapping[str, Any]) -> list[Picture]:
    """List the pictures of the inputs, whose crops count the rows of the encoder."""
    counts = inputs.get("batch_num_images")
    sizes = inputs["image_sizes"].tolist()
    # Several images in a prompt are not tiled, where the processor says how many there are.
    tiled = [True] * len(sizes) if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]
    side, row, pictures = side_of(model), 0, []
    limit = int(model.config.vision_aspect_ratio.rpartition("_")[2])
    for size, cut in zip(sizes, tiled, strict=True):
        tiles = tiles_of(model, size) if cut else (0, 0)
        pictures.append(_picture(side, tiles, size, row, limit))
        row += 1 + tiles[0] * tiles[1]
    return pictures


def _picture(side: int, tiles: Grid, size: Sequence[int], first_row: int, limit: int) -> Picture:
    length, crops, extents = mosaic(side, tiles, size, first_row)
    if not tiles[0] * tiles[1]:
        return Picture((0, 0), (0, 0), (0, 0), (0, 0), crops, Layout(length, (1, side, side), crops, extents))
    rows, columns = unpadded(size, tiles[0] * side, tiles[1] * side)
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    ratio = math.sqrt(height * width / (limit * side**2))
    if ratio <= 1.1:  # the model leaves a mosaic alone that is hardly above its limit
        layout = Layout(length, (len(crops), side, side), crops, extents)
        return Picture(tiles, rows, columns, (height, width), crops, layout)
    shape = (int(height // ratio), int(width // ratio))
    position = side * side + torch.arange(shape[0])[:, None] * (shape[1] + 1) + torch.arange(shape[1])
    scaled = [crops[0]]
    for crop in crops[1:]:
        assert crop.box is not None
        left, top, right, bottom = crop.box
        (c0, c1), (r0, r1) = _inside(left, right, shape[1]), _inside(top, bottom, shape[0])
        if r0 < r1 and c0 < c1:
            box = (c0 / shape[1], r0 / shape[0], c1 / shape[1], r1 / shape[0])
            index = position[r0:r1, c0:c1].flatten()
            scaled.append(replace(crop, index=index, grid=(r1 - r0, c1 - c0), box=box, offset=(0, 0)))
    starts = [side * side + r * (shape[1] + 1) for r in range(shape[0] + 1)]
    extents = tuple((start, start + shape[1]) for start in starts[:-1])
    layout = Layout(starts[-1], (len(scaled), side, side), tuple(scaled), extents)
    return Picture(tiles, rows, columns, shape, crops, layout)


def _inside(start: float, stop: float, count: int) -> Grid:
    """Return the first and the last + 1 of so many equal parts of 1 whose middle lies between two shares."""
    return math.ceil(start * count - 0.5), math.ceil(stop * count - 0.5)
