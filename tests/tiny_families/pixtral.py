"""Pixtral: LLaVA's classes with Pixtral's tower, a token per patch."""

from transformers import LlavaConfig, LlavaForConditionalGeneration

from tiny_families.base import IMAGE, Tiny, llama_config
from tiny_families.mistral3 import padded, pixtral_config, place


class TinyPixtral(Tiny):
    name = "pixtral"
    visuals = ((32, 24), (16, 32), (24, 24))
    whole_grid = None

    def build(self):
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=pixtral_config(), text_config=llama_config(), image_token_id=IMAGE,
                vision_feature_layer=-1, vision_feature_select_strategy="full",
            )
        )  # fmt: skip

    def place(self, what, generator):
        return place(what, 4, generator)

    def collate(self, inputs):
        return padded(inputs)


TINY = TinyPixtral()
