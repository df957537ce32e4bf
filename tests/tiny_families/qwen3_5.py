"""Qwen3.5: a recurrent layer before one with attention, and a timestamp before each frame."""

from transformers import DynamicCache, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from tiny_families.base import IMAGE, VIDEO
from tiny_families.mrope import END, MERGE, PATCH, START, mrope_text
from tiny_families.qwen3_vl import TinyQwen3Vl


class TinyQwen35(TinyQwen3Vl):
    name = "qwen3_5"
    masks = False

    def build(self):
        vision = {
            "depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "patch_size": PATCH, "spatial_merge_size": MERGE, "num_position_embeddings": 64,
        }  # fmt: skip
        text = mrope_text(
            head_dim=8, layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        )  # fmt: skip
        text["rope_parameters"]["partial_rotary_factor"] = 1.0
        return Qwen3_5ForConditionalGeneration(
            Qwen3_5Config(
                vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
                vision_start_token_id=START, vision_end_token_id=END,
            )
        )  # fmt: skip

    def cache(self, net):
        return DynamicCache(config=net.config)

    def received(self, call):
        return call["inputs_embeds"]

    def logits(self, net, received, position_ids, **planes):
        return net(inputs_embeds=received, position_ids=position_ids).logits


TINY = TinyQwen35()
