"""SmolVLM: prompts and pictures as in Idefics3."""

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from tiny_families.base import IMAGE, llama_config
from tiny_families.idefics3 import VISION, TinyIdefics3


class TinySmolVLM(TinyIdefics3):
    name = "smolvlm"

    def build(self):
        return SmolVLMForConditionalGeneration(
            SmolVLMConfig(vision_config=VISION, text_config=llama_config(), image_token_id=IMAGE, scale_factor=2)
        )


TINY = TinySmolVLM()
