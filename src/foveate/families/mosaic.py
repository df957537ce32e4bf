"""Mosaics of tiles, cut to the picture, with a newline vector after each row: LLaVA-NeXT and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from foveate.core.spans import Crop
from foveate.families.layout import Grid


def side_of(model: Any) -> int:
    """Return how many patches a tile is high and wide."""
    vision = model.config.vision_config
    return int(vision.image_size // vision.patch_size)


def tiles_of(model: Any, size: Sequence[int]) -> Grid:
    """Return the rows and columns of tiles of a picture of a size ``(height, width)``."""
    height, width = select_best_resolution(list(size), model.config.image_grid_pinpoints)
    side = model.config.vision_config.image_size
    return height // side, width // side


def mosaic(
    side: int, tiles: Grid, size: Sequence[int], first_row: int
) -> tuple[int, tuple[Crop, ...], tuple[Grid, ...]]:
    """Return the length of an image's span, its crops (the first in row `first_row` of the encoder), and its rows."""
    overview = Crop(torch.arange(side * side), (side, side), encoder_row=first_row)
    if tiles[0] * tiles[1] == 0:  # an overview alone has a single newline behind it
        return side * side + 1, (overview,), ((0, side * side),)
    height, width = tiles[0] * side, tiles[1] * side
    (top, bottom), (left, right) = unpadded(size, height, width)
    position = torch.full((height, width), -1, dtype=torch.long)
    rows, columns = bottom - top, right - left
    # Each row of the cut mosaic is followed by its newline vector.
    steps = torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns)
    position[top:bottom, left:right] = side * side + steps
    crops = [overview]
    for i in range(tiles[0]):
        for j in range(tiles[1]):
            tile = position[i * side : (i + 1) * side, j * side : (j + 1) * side]
            inside = tile >= 0
            h, w = int(inside.any(1).sum()), int(inside.any(0).sum())
            offset = (int(inside.any(1).int().argmax()), int(inside.any(0).int().argmax())) if h * w else (0, 0)
            y, x = i * side + offset[0] - top, j * side + offset[1] - left
            # A picture so thin that nothing of it is left has tiles, but no rows or no columns.
            box = (x / columns, y / rows, (x + w) / columns, (y + h) / rows) if h * w else (0.0, 0.0, 0.0, 0.0)
            crops.append(Crop(tile[inside], (h, w), box, offset, first_row + len(crops)))
    starts = [side * side + r * (columns + 1) for r in range(rows + 1)]
    return starts[-1], tuple(c for c in crops if len(c)), tuple((start, start + columns) for start in starts[:-1])


def unpadded(size: Sequence[int], height: int, width: int) -> tuple[Grid, Grid]:
    """Return the rows and the columns of a mosaic that show the picture and not its padding."""
    # Rounded as transformers' unpad_image rounds: one pixel more would move every token behind it.
    original_height, original_width = size
    if original_width / original_height > width / height:
        margin = (height - int(round(original_height * (width / original_width), 7))) // 2
        return (margin, height - margin), (0, width)
    margin = (width - int(round(original_width * (height / original_height), 7))) // 2
    return (0, height), (margin, width - margin)


def without_fillers(pixels: Tensor, tiles: Sequence[Grid]) -> Tensor:
    """Return the pixels ``[R, 3, side, side]`` of all crops of images of so many rows and columns of tiles."""
    return torch.cat([image[: 1 + h * w] for image, (h, w) in zip(pixels, tiles, strict=True)])
