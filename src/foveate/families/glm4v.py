"""GLM-4.xV: videos are pictures with timestamps, and their placeholders are those of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from foveate.core.spans import Span
from foveate.families.mrope import TYPES, MRopeFamily


class Glm4v(MRopeFamily):
    """GLM-4.1V, GLM-4.5V and GLM-4.6V: as Qwen2-VL, with a convolution for a merger."""

    name = "glm4v"
    model_types = ("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr")
    notes = "as qwen2_vl; timestamps between frames stay; no images beside videos in one batch, as in the model itself"

    def types(self, model: Any, ids: Tensor) -> Tensor:
        config = model.config
        # Placeholders of videos differ from those of images only in the markers that they stand between.
        opened = (ids == config.video_start_token_id).cumsum(1) - (ids == config.video_end_token_id).cumsum(1)
        kinds = torch.where(opened > 0, TYPES["video"], TYPES["image"])
        return kinds.masked_fill(ids != config.image_token_id, 0)

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        # For beams, the model repeats images one by one: joined, those of a prompt stay in the prompt's order.
        outputs = {}
        for kind in dict.fromkeys(span.kind for span in spans):
            own = [(span.sample, x) for span, x in zip(spans, embeds, strict=True) if span.kind == kind]
            prompts = groupby(own, key=lambda pair: pair[0])
            outputs[kind] = self.output([torch.cat([x for _, x in pairs]) for _, pairs in prompts])
        return outputs
