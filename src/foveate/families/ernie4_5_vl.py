"""ERNIE 4.5 VL: experts of text and of images, and a resampler of 2 x 2 patches."""

from typing import Any, ClassVar

from torch import nn

from foveate.families.mrope import MRopeFamily


class Ernie4_5Vl(MRopeFamily):  # noqa: N801  the model's own name
    """ERNIE 4.5 VL with images; ``moe_mm_token_type_ids``, which choose the experts, are compacted with the rest."""

    name = "ernie4_5_vl"
    model_types = ("ernie4_5_vl_moe",)
    inputs: ClassVar = {"pixel_values": "image"}
    side_inputs = ("image_grid_thw",)
    notes = "as qwen2_vl, images only"

    def encoder(self, model: Any) -> nn.Module:
        return model.model.vision_tower  # type: ignore[no-any-return]

    def projector(self, model: Any) -> nn.Module:
        return model.model.resampler_model  # type: ignore[no-any-return]
