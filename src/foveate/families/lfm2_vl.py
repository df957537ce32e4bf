"""LFM2-VL: SigLIP 2 at native aspect ratios, tokens of 2 x 2 patches, an LLM of attention and short convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.families.layout import Grid
from foveate.families.raster import RasterFamily
from foveate.families.tower import resized


class Lfm2Vl(RasterFamily):
    """LFM2-VL.

    Every picture that the encoder sees is an image of its own: the model's inputs do not say which tiles belong
    together. The LLM's convolutions mix neighbours; after reduction, the neighbours are those that are left.
    """

    recurrent = True
    packs = False
    name = "lfm2_vl"
    model_types = ("lfm2_vl",)
    side_inputs = ("spatial_shapes", "pixel_attention_mask")
    notes = "each tile is an image; dropped tokens are absent from the LLM's convolutions, not masked"

    def grids(self, model: Any, inputs: Mapping[str, Any]) -> list[Grid]:
        return [(height, width) for height, width in inputs["spatial_shapes"].tolist()]

    def block(self, model: Any) -> int:
        return int(model.config.downsample_factor)

    def padded_patches(self, inputs: Mapping[str, Any]) -> int:
        return int(inputs["pixel_values"].shape[1])  # patches cut out already, as many for each picture

    def encode_smaller(self, model: Any, inputs: Mapping[str, Any], picture: int, grid: Grid) -> Tensor:
        patch, block = model.config.vision_config.patch_size, self.block(model)
        (height, width), (h, w) = self.grids(model, inputs)[picture], (grid[0] * block, grid[1] * block)
        # A row holds the pixels of a patch: its rows, their columns, the three colours.
        rows = inputs["pixel_values"][picture, : height * width].reshape(height, width, patch, patch, -1)
        whole = rows.permute(4, 0, 2, 1, 3).reshape(-1, height * patch, width * patch)
        small = resized(whole, (h * patch, w * patch)).reshape(-1, h, patch, w, patch)
        pixels = small.permute(1, 3, 2, 4, 0).reshape(1, h * w, -1)
        shapes, mask = torch.tensor([[h, w]]), torch.ones(1, h * w, dtype=torch.long)
        side = {"spatial_shapes": shapes.to(pixels.device), "pixel_attention_mask": mask.to(pixels.device)}
        output = self.image_features(model, {**inputs, "pixel_values": pixels, **side}, "image")
        return torch.cat(list(output.pooler_output))
