"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: Qwen2.5-VL and Qwen3-VL that also listen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core.errors import InputError
from foveate.families.mrope import MRopeFamily
from foveate.families.qwen2_5_vl import Qwen2_5Vl
from foveate.families.qwen3_vl import Qwen3Vl


class _Thinker(MRopeFamily):
    """Sounds are left alone: their tokens count as text, and have positions of their own."""

    side_inputs: ClassVar[tuple[str, ...]] = ("image_grid_thw", "video_grid_thw", "video_second_per_grid")

    def positions(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        if inputs.get("use_audio_in_video"):
            raise InputError(f"{self.name} takes no videos whose sound lies between their frames: pass it by itself")
        mask, sounds = inputs.get("attention_mask"), inputs.get("audio_feature_lengths")
        if (heard := inputs.get("feature_attention_mask")) is not None:
            sounds = heard.sum(dim=-1)
        positions, _ = model.get_rope_index(
            inputs["input_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            attention_mask=torch.ones_like(inputs["input_ids"]) if mask is None else mask,
            audio_seqlens=sounds,
            second_per_grids=inputs.get("video_second_per_grid"),
        )
        # Positions of padding are floats in some versions.
        return positions.long()  # type: ignore[no-any-return]


class Qwen2_5Omni(_Thinker, Qwen2_5Vl):  # noqa: N801  the model's own name
    """The thinker of Qwen2.5-Omni."""

    name = "qwen2_5_omni"
    model_types = ("qwen2_5_omni_thinker",)
    notes = "the thinker; as qwen2_5_vl; sounds are left alone, but not those inside videos"


class Qwen3Omni(_Thinker, Qwen3Vl):
    """The thinker of Qwen3-Omni."""

    name = "qwen3_omni"
    model_types = ("qwen3_omni_moe_thinker",)
    notes = "the thinker; as qwen3_vl; sounds are left alone, but not those inside videos"
