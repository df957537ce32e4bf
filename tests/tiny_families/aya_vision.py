"""Aya Vision: tiles of 4 x 4 tokens behind markers, the overview last."""

from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config

from tiny_families.base import IMAGE, Tiny, picture, siglip_config, text_shape

START, END, TILE, OVERVIEW, TOKENS = 111, 112, 113, 114, 16


class TinyAyaVision(Tiny):
    name = "aya_vision"
    visuals = (1, 3, 5)
    whole_grid = (4, 4)

    def build(self):
        text = Cohere2Config(**text_shape(intermediate_size=80), logit_scale=1.0)
        return AyaVisionForConditionalGeneration(
            AyaVisionConfig(
                vision_config=siglip_config(), text_config=text,
                image_token_index=IMAGE, vision_feature_layer=-1, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        ids = [START]
        for i in range(1, what):
            ids += [TILE, i, *[IMAGE] * TOKENS]  # the marker's number is a token of its own
        ids += [OVERVIEW, *[IMAGE] * TOKENS, END]
        return {"ids": ids, "pixel_values": [picture(generator, what, 3, 32, 32)]}


TINY = TinyAyaVision()
