"""PaddleOCR-VL: a SigLIP-like encoder at any resolution, whose patches the projector merges."""

from typing import Any, ClassVar

from torch import nn

from foveate.families.mrope import MRopeFamily


class PaddleOcrVl(MRopeFamily):
    """PaddleOCR-VL: images only; patches lie in raster order until the projector merges 2 x 2 of them."""

    name = "paddleocr_vl"
    model_types = ("paddleocr_vl",)
    inputs: ClassVar = {"pixel_values": "image"}
    side_inputs = ("image_grid_thw",)
    patches_by_token = False
    notes = "as qwen2_vl, images only"

    def projector(self, model: Any) -> nn.Module:
        return model.model.projector  # type: ignore[no-any-return]
