"""Qwen2-VL: pictures of different sizes and videos, 2 x 2 patches per token."""

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tiny_families.base import IMAGE, VIDEO
from tiny_families.mrope import END, MERGE, PATCH, START, TinyMRope, mrope_text


class TinyQwen2Vl(TinyMRope):
    name = "qwen2_vl"

    def build(self):
        vision = {
            "depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        }  # fmt: skip
        return Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                vision_config=vision, text_config=mrope_text(), image_token_id=IMAGE, video_token_id=VIDEO,
                vision_start_token_id=START, vision_end_token_id=END,
            )
        )  # fmt: skip


TINY = TinyQwen2Vl()
