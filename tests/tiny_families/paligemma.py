"""PaliGemma: one picture of 8 x 8 tokens; the whole prompt attends in both directions."""

import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from tiny_families.base import IMAGE, Tiny, picture, siglip_config, text_shape


class TinyPaliGemma(Tiny):
    name = "paligemma"
    visuals = ("image", "image", "image")
    whole_grid = None
    packs_features = False
    type_plane = "token_type_ids"
    answer_type = 1

    def build(self):
        return PaliGemmaForConditionalGeneration(
            PaliGemmaConfig(
                vision_config=siglip_config(projection_dim=32), text_config=GemmaConfig(**text_shape(), head_dim=8),
                image_token_index=IMAGE, projection_dim=32, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        return {"ids": [IMAGE] * 64, "pixel_values": [picture(generator, 1, 3, 32, 32)]}

    def types(self, ids):
        return torch.zeros_like(ids)

    def allowed(self, inputs):
        prefix = inputs["token_type_ids"] == 0
        return super().allowed(inputs) | (prefix[:, :, None] & prefix[:, None, :])

    skips = {  # noqa: RUF012
        "test_second_turn_on_the_same_cache": "PaliGemma has one prefix and no turns",
    }


TINY = TinyPaliGemma()
