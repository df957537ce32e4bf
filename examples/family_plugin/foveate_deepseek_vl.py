"""DeepSeek-VL: a SigLIP tower, one crop per image, and an aligner that maps each token by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from foveate.author import Grid, RasterFamily, Span, joined_outputs, resized


class DeepseekVl(RasterFamily):
    """DeepSeek-VL, 1.3B and 7B in their versions without the second tower."""

    name = "deepseek_vl"
    model_types = ("deepseek_vl",)
    notes = "one grid per image; pruned behind the aligner"

    def encoder(self, model: Any) -> nn.Module:
        return model.model.vision_model  # type: ignore[no-any-return]

    def grids(self, model: Any, inputs: Mapping[str, Any]) -> list[Grid]:
        images, _, height, width = inputs["pixel_values"].shape
        h, w = self.patch_size(model)
        return [(height // h, width // w)] * images

    def block(self, model: Any) -> int:
        return 1

    def encode_smaller(self, model: Any, inputs: Mapping[str, Any], picture: int, grid: Grid) -> Tensor:
        h, w = self.patch_size(model)
        small = resized(inputs["pixel_values"][picture], (grid[0] * h, grid[1] * w))
        patches = model.model.vision_model(small, interpolate_pos_encoding=True).last_hidden_state
        return model.model.aligner(patches)[0]  # type: ignore[no-any-return]

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return joined_outputs(spans, embeds)
