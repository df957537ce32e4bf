"""PerceptionLM: a Perception Encoder of timm, tokens averaged over squares behind the projector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.core.spans import Span
from foveate.families.base import joined_outputs
from foveate.families.merged import Layout, MergedFamily, mean_of_blocks
from foveate.families.tiled import WHOLE, crop_layout, located, tile_boxes


class PerceptionLM(MergedFamily):
    """PerceptionLM. The overview comes first, then the tiles; every frame of a video is a crop of the whole picture."""

    name = "perception_lm"
    model_types = ("perception_lm",)
    inputs: ClassVar = {"pixel_values": "image", "pixel_values_videos": "video"}
    has_cls = True
    notes = "overview, tiles and frames are crops; pruned behind the projector, which averages patches"

    def encoder(self, model: Any) -> nn.Module:
        return model.model.vision_tower  # type: ignore[no-any-return]

    def lead(self, model: Any) -> int:
        return int(model.config.vision_use_cls_token)

    def image_features(self, model: Any, inputs: Mapping[str, Any], kind: str) -> Any:
        key = "pixel_values" if kind == "image" else "pixel_values_videos"
        return model.model.get_image_features(inputs[key], return_dict=True)

    def layouts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[Layout]:
        pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
        count, crops = pixels.shape[:2]
        placeholders = int((inputs["input_ids"] == self.token_id(model, kind)).sum())
        side = math.isqrt(placeholders // (count * crops))
        if placeholders != count * crops * side * side:
            raise InputError(
                f"the prompts hold {placeholders} {kind} placeholder tokens, which cannot be square grids of "
                f"{count} {kind}(s) of {crops} crops: let the model's processor expand one {kind} token per {kind}"
            )
        boxes = [WHOLE] * crops if kind == "video" else tile_boxes(crops, "first", None)
        return [crop_layout((side, side), i * crops, boxes) for i in range(count)]

    def to_tokens(self, model: Any, inputs: Mapping[str, Any], kind: str, values: Tensor) -> Tensor:
        side = math.isqrt(values.shape[1])
        return mean_of_blocks(values, (side, side), model.config.projector_pooling_ratio).flatten(0, 1)

    def located(self, spans: Sequence[Span], size: tuple[int, int]) -> tuple[Span, ...]:
        return located(spans, size, "first")

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return joined_outputs(spans, embeds)
