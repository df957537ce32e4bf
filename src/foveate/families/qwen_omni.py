"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: Qwen2.5-VL and Qwen3-VL that also listen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from foveate.core.errors import InputError
from foveate.families.qwen2_5_vl import Qwen2_5Vl
from foveate.families.qwen3_vl import Qwen3Vl

_SIDE: Final = ("image_grid_thw", "video_grid_thw", "video_second_per_grid")
_NOTES: Final = "; sounds are left alone, but not those inside videos"


class Qwen2_5Omni(Qwen2_5Vl):  # noqa: N801  the model's own name
    """The thinker of Qwen2.5-Omni."""

    name = "qwen2_5_omni"
    model_types = ("qwen2_5_omni_thinker",)
    side_inputs = _SIDE
    notes = f"the thinker; as qwen2_5_vl{_NOTES}"

    def positions(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        return _positions(model, inputs)


class Qwen3Omni(Qwen3Vl):
    """The thinker of Qwen3-Omni."""

    name = "qwen3_omni"
    model_types = ("qwen3_omni_moe_thinker",)
    side_inputs = _SIDE
    notes = f"the thinker; as qwen3_vl{_NOTES}"

    def positions(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        return _positions(model, inputs)


def _positions(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the M-RoPE positions ``[3, B, L]`` of full prompts, in which sounds have positions of their own."""
    if inputs.get("use_audio_in_video"):
        raise InputError("sounds between the frames of a video cannot be told from them: pass the sound by itself")
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
    return positions  # type: ignore[no-any-return]
