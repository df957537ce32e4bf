"""Families whose encoder sees whole pictures, each a raster of patches of which a token merges a square block."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.spans import Crop, Span
from foveate.families.base import Process, Size
from foveate.families.layout import Grid, Layout
from foveate.families.merged import MergedFamily, mean_of_blocks


class RasterFamily(MergedFamily):
    """One crop per picture. A subclass says how many patches each picture has, and how many make a token."""

    inputs: ClassVar = {"pixel_values": "image"}
    resizes = True

    @abstractmethod
    def grids(self, model: Any, inputs: Mapping[str, Any]) -> list[Grid]:
        """Return the rows and columns of patches of each picture."""

    @abstractmethod
    def block(self, model: Any) -> int:
        """Return how many patches a token is high and wide."""

    def patches_per_row(self, model: Any) -> int:
        return self.block(model) ** 2

    @abstractmethod
    def encode_smaller(self, model: Any, inputs: Mapping[str, Any], picture: int, grid: Grid) -> Tensor:
        """Encode one picture at a smaller grid of tokens ``(h, w)``, ``[h * w, D]``."""

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        return [
            [self.encode_smaller(model, inputs, c.encoder_row, grid) for c, grid in zip(s.crops, sizes, strict=True)]
            for s, sizes in zip(spans, grids, strict=True)
        ]

    def picture_grid(self, model: Any) -> Grid | None:
        return None

    def patch_grids(self, model: Any, inputs: Mapping[str, Any], key: str) -> list[Grid]:
        return self.grids(model, inputs)

    def imagined_images(
        self, model: Any, size: Size, images: int, process: Process
    ) -> tuple[list[Layout], dict[str, Any]]:
        inputs = process(images)
        return self.layouts(model, inputs, "image"), inputs

    def layouts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[Layout]:
        block, layouts = self.block(model), []
        for i, (height, width) in enumerate(self.grids(model, inputs)):
            h, w = height // block, width // block
            layouts.append(Layout(h * w, (1, h, w), (Crop(torch.arange(h * w), (h, w), encoder_row=i),)))
        return layouts

    def encoder(self, model: Any) -> nn.Module:
        return model.model.vision_tower  # type: ignore[no-any-return]

    def patch_counts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[int]:
        return list(map(math.prod, self.grids(model, inputs)))

    def to_tokens(self, model: Any, inputs: Mapping[str, Any], kind: str, values: Tensor) -> Tensor:
        grids = self.grids(model, inputs)
        pictures = torch.split(values.flatten(0, 1), list(map(math.prod, grids)))
        merged = [mean_of_blocks(x[None], grid, self.block(model)) for x, grid in zip(pictures, grids, strict=True)]
        return torch.cat(merged, dim=1)[0]

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return {"image": BaseModelOutputWithPooling(pooler_output=list(embeds))}
