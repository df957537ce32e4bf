"""LLaVA-OneVision: tiles of 8 x 8 patches, a mosaic that is scaled down if it is large, videos of pooled frames."""

import functools

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config

from tiny_families.base import IMAGE, VIDEO, picture, siglip_config, text_shape
from tiny_families.llava_next import PINPOINTS
from tiny_families.llava_next_video import FRAMES, TinyLlavaNextVideo

SCALING = "anyres_max_2"


class TinyLlavaOnevision(TinyLlavaNextVideo):
    name = "llava_onevision"
    visuals = ("video", (24, 64), (60, 64))

    def build(self):
        return LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                vision_config=siglip_config(), text_config=Qwen2Config(**text_shape()), image_token_index=IMAGE,
                video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS, vision_aspect_ratio=SCALING,
            )
        )  # fmt: skip

    def place(self, what, generator):
        if what == "video":
            pixels = picture(generator, 1, FRAMES, 3, 32, 32)
            return {"ids": [VIDEO] * (FRAMES * 16 + 1), "pixel_values_videos": [pixels]}
        return super().place(what, generator)

    @functools.cache  # noqa: B019  there is one object of the class
    def packed_length(self, size, crops):
        inner = self.original.model
        features = [torch.zeros(crops, 64, 32)]
        _, lengths = inner.pack_image_features(features, torch.tensor([size]), inner.image_newline, SCALING)
        return int(lengths[0])


TINY = TinyLlavaOnevision()
