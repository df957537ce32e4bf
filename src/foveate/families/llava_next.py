"""LLaVA-NeXT: an overview crop plus a mosaic of tiles, cut to the picture, with a newline vector after each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Probe
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.families.base import Grid, placeholder_columns
from foveate.families.llava import Llava, strategy
from foveate.families.tower import crop_rows, token_planes, with_cls


class LlavaNext(Llava):
    """LLaVA-NeXT (1.6) at any resolution.

    Crop 0 is the overview, then the tiles row by row. Patches in the padded band are no candidates. Newline vectors
    belong to no crop; the engine's ``separators`` option says whether they stay.
    """

    name = "llava_next"
    model_types = ("llava_next",)
    notes = "overview and tiles are crops; padding is never a candidate; newline vectors follow `separators`"

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        if strategy(model, inputs) != "default":
            raise UnsupportedModelError("LLaVA-NeXT is supported with vision_feature_select_strategy='default'")
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        layouts, row = [], 0
        for size in inputs["image_sizes"].tolist():
            tiles = tiles_of(model, size)
            layouts.append(mosaic(side, tiles, size, row))
            row += 1 + tiles[0] * tiles[1]
        lengths = [length for length, _, _ in layouts]
        ids = inputs["input_ids"].cpu()
        spans: list[Span] = []
        for i, (sample, columns) in enumerate(placeholder_columns(ids, model.config.image_token_id, lengths, "image")):
            _, crops, extents = layouts[i]
            ordinal = sum(s.sample == sample for s in spans)
            spans.append(Span("image", sample, ordinal, columns, (len(crops), side, side), crops, extents))
        return tuple(spans)

    def pixels(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the pixels of all crops of all images, without the batch's filler crops."""
        pixels: Tensor = inputs["pixel_values"]
        if pixels.dim() == 4:
            return pixels
        return without_fillers(pixels, [tiles_of(model, size) for size in inputs["image_sizes"].tolist()])

    def tokens(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        spans: Sequence[Span],
        probes: Sequence[Probe],
        features: Tensor,
        values: Mapping[Probe, Tensor],
    ) -> VisualTokens:
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        patches = features[:, 1:]
        crops = [c for s in spans for c in s.crops]
        planes = token_planes(crops, (side, side), patches, values)
        hidden = [_in_span_order(span, patches, side) for span in spans]
        tokens = VisualTokens(tuple(spans), planes, features.device, hidden)
        return self.with_embeddings(model, with_cls(tokens, features[:, 0], probes), probes)

    def fill_separators(self, model: Any, span: Span, embeds: Tensor, kept: Tensor) -> Tensor:
        newline = model.model.image_newline.to(embeds)
        separators = span.separators().to(kept.device)
        return torch.where(torch.isin(kept, separators).to(embeds.device)[:, None], newline, embeds)


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
    if tiles == (0, 0) or tiles[0] * tiles[1] == 0:
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
    original_height, original_width = size
    if original_width / original_height > width / height:
        margin = (height - int(round(original_height * (width / original_width), 7))) // 2
        return (margin, height - margin), (0, width)
    margin = (width - int(round(original_width * (height / original_height), 7))) // 2
    return (0, height), (margin, width - margin)


def without_fillers(pixels: Tensor, tiles: Sequence[Grid]) -> Tensor:
    """Return the pixels ``[R, 3, side, side]`` of all crops of images of so many rows and columns of tiles."""
    return torch.cat([image[: 1 + h * w] for image, (h, w) in zip(pixels, tiles, strict=True)])


def _in_span_order(span: Span, patches: Tensor, side: int) -> Tensor:
    hidden = patches.new_zeros(len(span), patches.shape[-1])
    index = torch.cat([crop.index for crop in span.crops]).to(patches.device)
    return hidden.index_copy(0, index, torch.cat([crop_rows(patches, c, (side, side)) for c in span.crops]))
