"""Mistral 3: pictures of several sizes, tokens of 2 x 2 patches, a marker after each row."""

from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

from tiny_families.base import IMAGE, Tiny, picture, text_shape

BREAK, END = 111, 112


def pixtral_config():
    return PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=4
    )


def place(size, token, generator):
    """A row of placeholders and a marker for each row of tokens, ``token`` pixels high and wide."""
    height, width = (side // token for side in size)
    ids = ([IMAGE] * width + [BREAK]) * height
    return {"ids": [*ids[:-1], END], "pixel_values": [picture(generator, 1, 3, *size)], "image_sizes": [list(size)]}


class TinyMistral3(Tiny):
    name = "mistral3"
    visuals = ((64, 48), (32, 64), (48, 48))
    whole_grid = None

    def build(self):
        return Mistral3ForConditionalGeneration(
            Mistral3Config(
                vision_config=pixtral_config(), text_config=MistralConfig(**text_shape(), sliding_window=None),
                image_token_index=IMAGE, spatial_merge_size=2, vision_feature_layer=-1, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        return place(what, 8, generator)

    def collate(self, inputs):
        return padded(inputs)


def padded(inputs):
    """Pad pictures to the largest with what nobody may look at."""
    import torch

    pictures = [x for row in inputs["pixel_values"] for x in row]
    height, width = (max(x.shape[d] for x in pictures) for d in (2, 3))
    filled = torch.full((len(pictures), 3, height, width), 7.0)
    for i, x in enumerate(pictures):
        filled[i, :, : x.shape[2], : x.shape[3]] = x[0]
    sizes = torch.tensor([size for row in inputs["image_sizes"] for size in row])
    return {"pixel_values": filled, "image_sizes": sizes}


TINY = TinyMistral3()
