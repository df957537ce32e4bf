"""LLaVA: one picture of 8 x 8 patches."""

from transformers import LlavaConfig, LlavaForConditionalGeneration

from tiny_families.base import IMAGE, Tiny, clip_config, llama_config, picture


class TinyLlava(Tiny):
    name = "llava"
    visuals = ("image", "image", "image")

    def build(self):
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=clip_config(), text_config=llama_config(), image_token_id=IMAGE, image_seq_length=64,
                vision_feature_layer=-2, vision_feature_select_strategy="default",
            )
        )  # fmt: skip

    def place(self, what, generator):
        return {"ids": [IMAGE] * 64, "pixel_values": [picture(generator, 1, 3, 32, 32)]}


TINY = TinyLlava()
