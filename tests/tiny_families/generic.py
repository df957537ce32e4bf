"""The generic family on LightOnOCR, which has none of its own: square pictures of several sizes."""

from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration, Qwen3Config

from tiny_families.base import IMAGE, Tiny, text_shape
from tiny_families.mistral3 import padded, pixtral_config, place


class TinyGeneric(Tiny):
    name = "generic"
    visuals = ((48, 48), (40, 40), (64, 64))

    def build(self):
        return LightOnOcrForConditionalGeneration(
            LightOnOcrConfig(
                vision_config=pixtral_config(), text_config=Qwen3Config(**text_shape(), head_dim=8),
                image_token_id=IMAGE, spatial_merge_size=2, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        return place(what, 8, generator)

    def collate(self, inputs):
        return padded(inputs)


TINY = TinyGeneric()
