"""Families: the only files that know the model classes of transformers."""

from __future__ import annotations

from typing import Any

from foveate.errors import UnsupportedModelError
from foveate.families.aya_vision import AyaVision
from foveate.families.base import Family
from foveate.families.cohere2_vision import Cohere2Vision
from foveate.families.fast_vlm import FastVlm
from foveate.families.glm4v import Glm4v
from foveate.families.idefics3 import Idefics3
from foveate.families.internvl import InternVL
from foveate.families.llava import Llava
from foveate.families.llava_next import LlavaNext
from foveate.families.llava_next_video import LlavaNextVideo
from foveate.families.llava_onevision import LlavaOnevision
from foveate.families.paddleocr_vl import PaddleOcrVl
from foveate.families.perception_lm import PerceptionLM
from foveate.families.qwen2_5_vl import Qwen2_5Vl
from foveate.families.qwen2_vl import Qwen2Vl
from foveate.families.qwen3_5 import Qwen3_5
from foveate.families.qwen3_vl import Qwen3Vl
from foveate.families.smolvlm import SmolVLM
from foveate.families.video_llava import VideoLlava
from foveate.families.vipllava import VipLlava

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Llava(),
        LlavaNext(),
        VideoLlava(),
        VipLlava(),
        LlavaNextVideo(),
        LlavaOnevision(),
        InternVL(),
        Idefics3(),
        SmolVLM(),
        AyaVision(),
        Cohere2Vision(),
        FastVlm(),
        PerceptionLM(),
        Qwen2Vl(),
        Qwen2_5Vl(),
        Qwen3Vl(),
        Qwen3_5(),
        Glm4v(),
        PaddleOcrVl(),
    )
}


def list_families() -> list[str]:
    """Return the names of the supported model families."""
    return list(FAMILIES)


def family_of(model: Any) -> Family:
    """Return the family of a model, by its ``config.model_type``.

    Raises
    ------
    UnsupportedModelError
        If no family knows the model; the message lists those there are.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES.values():
        if model_type in family.model_types:
            if not hasattr(model, "generate"):
                raise UnsupportedModelError(
                    f"{type(model).__name__} has no language-model head: pass the whole model, such as one loaded with "
                    "AutoModelForImageTextToText"
                )
            return family
    raise UnsupportedModelError(
        f"{type(model).__name__} (model type {model_type!r}) belongs to no supported family; "
        f"there are: {', '.join(FAMILIES)}"
    )


__all__ = ["FAMILIES", "Family", "family_of", "list_families"]
