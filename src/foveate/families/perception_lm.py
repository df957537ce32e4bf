"""PerceptionLM: a Perception Encoder of timm, tokens averaged over squares behind the projector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.core.spans import Span
from foveate.families.batches import joined_outputs
from foveate.families.layout import WHOLE, Grid, Layout, crop_layout, located, tile_boxes
from foveate.families.merged import MergedFamily, mean_of_blocks


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

    def tokens_of(self, model: Any, patches: Grid) -> Grid:
        block = int(model.config.projector_pooling_ratio)  # pooled behind the projector
        return patches[0] // block, patches[1] // block

    def patch_size(self, model: Any) -> Grid:
        # timm's configuration has no sizes; only its module knows them.
        timm = getattr(model.model.vision_tower, "timm_model", None)
        if timm is None:
            return super().patch_size(model)
        height, width = timm.patch_embed.patch_size
        return int(height), int(width)

    def picture_grid(self, model: Any) -> Grid | None:
        timm = getattr(model.model.vision_tower, "timm_model", None)
        if timm is None:
            return super().picture_grid(model)
        rows, columns = timm.patch_embed.grid_size
        return int(rows), int(columns)

    def image_features(self, model: Any, inputs: Mapping[str, Any], kind: str) -> Any:
        # The model has no get_video_features: frames go the way of pictures.
        key = "pixel_values" if kind == "image" else "pixel_values_videos"
        return model.model.get_image_features(inputs[key], return_dict=True)

    def layouts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[Layout]:
        pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
        count, crops = pixels.shape[:2]
        # timm's towers differ in their patches; the prompt tells how many tokens a crop has.
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
