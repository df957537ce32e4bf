"""Families: the only files that know the model classes of transformers; importing this package registers them."""

from __future__ import annotations

from foveate.families.aya_vision import AyaVision
from foveate.families.base import Family
from foveate.families.cohere2_vision import Cohere2Vision
from foveate.families.ernie4_5_vl import Ernie4_5Vl
from foveate.families.fast_vlm import FastVlm
from foveate.families.gemma3 import Gemma3
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
from foveate.families.qwen_omni import Qwen2_5Omni, Qwen3Omni
from foveate.families.registry import all_families, family_of, family_of_class, list_families, register_family
from foveate.families.smolvlm import SmolVLM
from foveate.families.video_llava import VideoLlava
from foveate.families.vipllava import VipLlava

for _family in (
    Llava,
    LlavaNext,
    VideoLlava,
    VipLlava,
    LlavaNextVideo,
    LlavaOnevision,
    InternVL,
    Idefics3,
    SmolVLM,
    AyaVision,
    Cohere2Vision,
    FastVlm,
    PerceptionLM,
    Qwen2Vl,
    Qwen2_5Vl,
    Qwen3Vl,
    Qwen3_5,
    Qwen2_5Omni,
    Qwen3Omni,
    Glm4v,
    PaddleOcrVl,
    Ernie4_5Vl,
    Gemma3,
    PaliGemma,
    Mistral3,
    Pixtral,
    Lfm2Vl,
    Ovis2,
):
    register_family(_family)

__all__ = ["Family", "all_families", "family_of", "family_of_class", "list_families", "register_family"]
