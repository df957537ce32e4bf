"""Families: the only files that know the model classes of transformers."""

from __future__ import annotations

from typing import Any

from foveate.core.errors import UnsupportedModelError
from foveate.families.aya_vision import AyaVision
from foveate.families.base import Family
from foveate.families.cohere2_vision import Cohere2Vision
from foveate.families.fast_vlm import FastVlm
from foveate.families.gemma3 import Gemma3
from foveate.families.generic import Generic, missing, missing_parts
from foveate.families.glm4v import Glm4v
from foveate.families.idefics3 import Idefics3
from foveate.families.internvl import InternVL
from foveate.families.lfm2_vl import Lfm2Vl
from foveate.families.llava import Llava
from foveate.families.llava_next import LlavaNext
from foveate.families.llava_next_video import LlavaNextVideo
from foveate.families.llava_onevision import LlavaOnevision
from foveate.families.ovis2 import Ovis2
from foveate.families.paddleocr_vl import PaddleOcrVl
from foveate.families.paligemma import PaliGemma
from foveate.families.perception_lm import PerceptionLM
from foveate.families.pixtral import Mistral3, Pixtral
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
        Gemma3(),
        PaliGemma(),
        Mistral3(),
        Pixtral(),
        Lfm2Vl(),
        Ovis2(),
        Generic(),
    )
}


def list_families() -> list[str]:
    """Return the names of the supported model families."""
    return list(FAMILIES)


def family_of(model: Any) -> Family:
    """Return the family of a model, by its configuration.

    A model of no family belongs to the generic one if its ``forward`` takes encoded images.

    Raises
    ------
    UnsupportedModelError
        If no family knows the model and it lacks what the generic family needs; the message says what.
    """
    config = getattr(model, "config", None)
    family = family_of_class(type(model), config)
    if not isinstance(family, Generic):
        return family
    if lacking := missing_parts(model):
        raise _unsupported(type(model), config, lacking)
    return family.of(model)


def family_of_class(model_class: type, config: Any) -> Family:
    """Return the family that models of a class with a configuration belong to, as far as that can tell.

    Raises
    ------
    UnsupportedModelError
        As in `family_of`.
    """
    for family in FAMILIES.values():
        if family.matches(config):
            if not hasattr(model_class, "generate"):
                raise UnsupportedModelError(
                    f"{model_class.__name__} has no language-model head: pass the whole model, such as one loaded with "
                    "AutoModelForImageTextToText"
                )
            return family
    if lacking := missing(model_class):
        raise _unsupported(model_class, config, lacking)
    return FAMILIES["generic"]


def _unsupported(model_class: type, config: Any, lacking: str) -> UnsupportedModelError:
    model_type = getattr(config, "model_type", None)
    return UnsupportedModelError(
        f"{model_class.__name__} (model type {model_type!r}) belongs to no supported family; "
        f"there are: {', '.join(FAMILIES)}; the generic family needs a model that it can hand encoded images to, and "
        f"this one lacks {lacking}"
    )


__all__ = ["FAMILIES", "Family", "family_of", "family_of_class", "list_families"]
