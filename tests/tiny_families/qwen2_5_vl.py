"""Qwen2.5-VL: windows of 2 x 2 tokens in all layers but the last, and videos with their own clock."""

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tiny_families.base import IMAGE, VIDEO
from tiny_families.mrope import END, MERGE, PATCH, START, TinyMRope, mrope_text


class TinyQwen25Vl(TinyMRope):
    name = "qwen2_5_vl"

    def build(self):
        vision = {
            "depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "patch_size": PATCH, "spatial_merge_size": MERGE, "window_size": 16, "fullatt_block_indexes": [2],
            "tokens_per_second": 4,
        }  # fmt: skip
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                vision_config=vision, text_config=mrope_text(), image_token_id=IMAGE, video_token_id=VIDEO,
                vision_start_token_id=START, vision_end_token_id=END,
            )
        )  # fmt: skip

    def place(self, what, generator):
        clock = {"second_per_grid_ts": [torch.tensor([0.75])]} if what[0] == "video" else {}
        return {**super().place(what, generator), **clock}


TINY = TinyQwen25Vl()
