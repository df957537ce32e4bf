"""FastVLM: pictures of 4 x 4 tokens from a convolutional network, which stands in for that of timm."""

import copy
from typing import ClassVar

from transformers import FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Config, ResNetConfig

from tiny_families.base import IMAGE, Tiny, picture, text_shape


class TinyFastVlm(Tiny):
    name = "fast_vlm"
    visuals = ("image", "image", "image")
    skips: ClassVar = {"test_attention_implementation_does_not_change_what_is_salient": "the encoder is convolutional"}
    whole_grid = (4, 4)

    def build(self):
        shape = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "hidden_size": 32}
        vision = ResNetConfig(**shape, layer_type="basic")
        return FastVlmForConditionalGeneration(
            FastVlmConfig(vision_config=vision, text_config=Qwen2Config(**text_shape()), image_token_index=IMAGE)
        )

    def _fresh(self, original, attention, dtype):
        fresh = copy.deepcopy(original).to(dtype)
        fresh.set_attn_implementation({"text_config": attention})
        return fresh

    def place(self, what, generator):
        return {"ids": [IMAGE] * 16, "pixel_values": [picture(generator, 1, 3, 32, 32)]}


TINY = TinyFastVlm()
