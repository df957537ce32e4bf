"""Command A Vision: tiles of 4 x 4 tokens, each with a line break behind it, the overview last."""

from transformers import Cohere2Config, Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

from tiny_families.base import IMAGE, Tiny, picture, siglip_config, text_shape

START, END, BREAK, TOKENS = 111, 112, 113, 16


class TinyCohere2Vision(Tiny):
    name = "cohere2_vision"
    visuals = (1, 3, 5)
    whole_grid = (4, 4)

    def build(self):
        text = Cohere2Config(**text_shape(intermediate_size=80), logit_scale=1.0)
        return Cohere2VisionForConditionalGeneration(
            Cohere2VisionConfig(
                vision_config=siglip_config(), text_config=text,
                image_token_id=IMAGE, alignment_intermediate_size=48, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        ids = [START, *[*[IMAGE] * TOKENS, BREAK] * what, END]
        return {"ids": ids, "pixel_values": [picture(generator, what, 3, 32, 32)]}


TINY = TinyCohere2Vision()
