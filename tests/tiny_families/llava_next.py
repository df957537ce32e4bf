"""LLaVA-NeXT: an overview and tiles of 8 x 8 patches."""

import functools

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tiny_families.base import IMAGE, Tiny, clip_config, llama_config, picture

PINPOINTS = [[32, 64], [64, 32], [64, 64]]


class TinyLlavaNext(Tiny):
    name = "llava_next"
    visuals = ((24, 64), (64, 20), (64, 64))

    def build(self):
        return LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=clip_config(), text_config=llama_config(), image_token_id=IMAGE,
                image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2, vision_feature_select_strategy="default",
            )
        )  # fmt: skip

    def place(self, what, generator):
        crops = image_size_to_num_patches(list(what), PINPOINTS, 32)
        return {
            "ids": [IMAGE] * self.packed_length(what, crops),
            "pixel_values": [picture(generator, 1, crops, 3, 32, 32)],
            "image_sizes": [torch.tensor([what])],
        }

    def collate(self, inputs):
        crops = [x for row in inputs["pixel_values"] for x in row]
        most = max((x.shape[1] for x in crops), default=0)
        # The fillers are no zeros: nobody may look at them.
        filled = [torch.cat([x, torch.full((1, most - x.shape[1], *x.shape[2:]), 7.0)], 1) for x in crops]
        return super().collate({**inputs, "pixel_values": [filled]})

    @functools.cache  # noqa: B019  there is one object of the class
    def packed_length(self, size, crops):
        inner = self.original.model
        features = [torch.zeros(crops, 64, 32)]
        _, lengths = inner.pack_image_features(features, torch.tensor([size]), "default", inner.image_newline)
        return int(lengths[0])


TINY = TinyLlavaNext()
