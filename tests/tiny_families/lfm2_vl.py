"""LFM2-VL: pictures of several sizes as padded rows of patches; a convolution between two layers of attention."""

import torch
from transformers import DynamicCache, Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

from tiny_families.base import IMAGE, Tiny, picture, text_shape


class TinyLfm2Vl(Tiny):
    name = "lfm2_vl"
    visuals = ((16, 12), (8, 16), (12, 12))
    whole_grid = None
    masks = False

    def build(self):
        vision = Siglip2VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_patches=64,
            patch_size=2, vision_use_head=False,
        )  # fmt: skip
        text = Lfm2Config(
            **text_shape(num_hidden_layers=3), layer_types=["full_attention", "conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
        )  # fmt: skip
        return Lfm2VlForConditionalGeneration(
            Lfm2VlConfig(
                vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_factor=2,
                projector_hidden_size=32, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        h, w = what
        return {
            "ids": [111] + [IMAGE] * (h * w // 4) + [112],
            "pixel_values": [picture(generator, h * w, 12)],
            "spatial_shapes": [list(what)],
        }

    def collate(self, inputs):
        rows = [x for row in inputs["pixel_values"] for x in row]
        filled, mask = (
            torch.full((len(rows), max(map(len, rows)), 12), 7.0),
            torch.zeros(len(rows), max(map(len, rows))),
        )
        for i, x in enumerate(rows):
            filled[i, : len(x)], mask[i, : len(x)] = x, 1
        shapes = torch.tensor([shape for row in inputs["spatial_shapes"] for shape in row])
        return {"pixel_values": filled, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}

    def cache(self, net):
        return DynamicCache(config=net.config)


TINY = TinyLfm2Vl()
