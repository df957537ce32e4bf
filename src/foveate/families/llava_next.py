"""LLaVA-NeXT: an overview crop plus a mosaic of tiles, cut to the picture, with a newline vector after each row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Probe
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens
from foveate.families.base import Process, Size
from foveate.families.batches import placeholder_columns
from foveate.families.layout import Layout
from foveate.families.llava import Llava, strategy
from foveate.families.mosaic import mosaic, side_of, tiles_of, without_fillers
from foveate.families.tower import crop_rows, token_planes, with_cls


class LlavaNext(Llava):
    """LLaVA-NeXT (1.6) at any resolution.

    Crop 0 is the overview, then the tiles row by row. Patches in the padded band are no candidates. Newline vectors
    belong to no crop; the engine's ``separators`` option says whether they stay.
    """

    name = "llava_next"
    model_types = ("llava_next",)
    takes_compressor = False
    notes = "overview and tiles are crops; padding is never a candidate; newline vectors follow `separators`"

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        if strategy(model, inputs) != "default":
            raise UnsupportedModelError("LLaVA-NeXT is supported with vision_feature_select_strategy='default'")
        side = side_of(model)
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

    def imagined_images(
        self, model: Any, size: Size, images: int, process: Process
    ) -> tuple[list[Layout], dict[str, Any]]:
        (width, height), side = size, side_of(model)
        tiles = tiles_of(model, (height, width))
        crops = 1 + math.prod(tiles)
        inputs = {
            "pixel_values": self.blank_pictures(model, images, crops),
            "image_sizes": torch.tensor([[height, width]] * images),
        }
        parts = [mosaic(side, tiles, (height, width), i * crops) for i in range(images)]
        return [Layout(length, (len(c), side, side), c, extents) for length, c, extents in parts], inputs

    def pixels(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the pixels of all crops of all images, without the batch's filler crops."""
        pixels: Tensor = inputs["pixel_values"]
        if pixels.dim() == 4:  # the model takes all crops in a row, too, and then without fillers
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
        side = side_of(model)
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


def _in_span_order(span: Span, patches: Tensor, side: int) -> Tensor:
    hidden = patches.new_zeros(len(span), patches.shape[-1])
    index = torch.cat([crop.index for crop in span.crops]).to(patches.device)
    return hidden.index_copy(0, index, torch.cat([crop_rows(patches, c, (side, side)) for c in span.crops]))
