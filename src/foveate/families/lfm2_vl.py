"""LFM2-VL: SigLIP 2 at native aspect ratios, tokens of 2 x 2 patches, an LLM of attention and short convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.families.base import Grid
from foveate.families.raster import RasterFamily


class Lfm2Vl(RasterFamily):
    """LFM2-VL.

    Every picture that the encoder sees is an image of its own: the model's inputs do not say which tiles belong
    together. The LLM's convolutions mix neighbours; after reduction, the neighbours are those that are left.
    """

    name = "lfm2_vl"
    model_types = ("lfm2_vl",)
    side_inputs = ("spatial_shapes", "pixel_attention_mask")
    notes = "each tile is an image; dropped tokens are absent from the LLM's convolutions, not masked"

    def grids(self, model: Any, inputs: Mapping[str, Any]) -> list[Grid]:
        return [(height, width) for height, width in inputs["spatial_shapes"].tolist()]

    def block(self, model: Any) -> int:
        return int(model.config.downsample_factor)
