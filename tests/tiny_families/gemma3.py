"""Gemma 3: one picture of 8 x 8 tokens, each the average of 2 x 2 patches; a sliding window in the first layer."""

import torch
import transformers
from packaging import version
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from tiny_families.base import IMAGE, Tiny, additive, picture, siglip_config, text_shape

WINDOW = 24


class TinyGemma3(Tiny):
    name = "gemma3"
    visuals = ("image", "image", "image")
    whole_grid = None
    type_plane = "token_type_ids"
    if version.parse(transformers.__version__) < version.parse("5.23"):
        # Seen with 5.19: a second turn's token types are read as if they were those of the first.
        skips = {"test_second_turn_on_the_same_cache": "needs a newer transformers"}

    def build(self):
        depth = text_shape(num_hidden_layers=0)["num_hidden_layers"]
        text = Gemma3TextConfig(
            **text_shape(num_hidden_layers=3), head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"][: depth or 3],
        )  # fmt: skip
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                vision_config=siglip_config(image_size=64), text_config=text, image_token_id=IMAGE,
                mm_tokens_per_image=64, boi_token_index=111, eoi_token_index=112, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        return {"ids": [111] + [IMAGE] * 64 + [112], "pixel_values": [picture(generator, 1, 3, 64, 64)]}

    def cache(self, net):
        return DynamicCache(config=net.config)

    def allowed(self, inputs):
        image = inputs["token_type_ids"] == 1
        starts = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
        number = torch.where(image, starts.cumsum(1), -1)
        same = (number[:, :, None] == number[:, None, :]) & image[:, :, None]
        return super().allowed(inputs) | same

    def mask(self, net, inputs, visible):
        """The window counts the columns that are there: what was dropped takes no place in it."""
        allowed, rank = self.allowed(inputs) & visible[:, None, :], visible.cumsum(1)
        near = rank[:, :, None] - rank[:, None, :] < WINDOW
        return {
            "full_attention": additive(allowed, net.dtype),
            "sliding_attention": additive(allowed & near, net.dtype),
        }


TINY = TinyGemma3()
