"""Qwen3-VL: features of two encoder layers reach the LLM, and a timestamp stands before each frame."""

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tiny_families.base import IMAGE, VIDEO
from tiny_families.mrope import END, MERGE, PATCH, STAMP, START, TinyMRope, mrope_text


class TinyQwen3Vl(TinyMRope):
    name = "qwen3_vl"

    def build(self):
        vision = {
            "depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "patch_size": PATCH, "spatial_merge_size": MERGE, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        return Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                vision_config=vision, text_config=mrope_text(head_dim=8), image_token_id=IMAGE, video_token_id=VIDEO,
                vision_start_token_id=START, vision_end_token_id=END,
            )
        )  # fmt: skip

    def ids(self, kind, frames, size):
        if kind == "image":
            return super().ids(kind, frames, size)
        frame = super().ids(kind, 1, size)
        return [token for i in range(frames) for token in (STAMP, 50 + i, *frame)]

    def received(self, call):
        embeds = call["inputs_embeds"]
        planes = [torch.zeros_like(embeds) for _ in call["deepstack_visual_embeds"] or ()]
        for plane, values in zip(planes, call["deepstack_visual_embeds"] or (), strict=True):
            plane[call["visual_pos_masks"]] = values
        return torch.stack([embeds, *planes], dim=2)

    def logits(self, net, received, position_ids, **planes):
        embeds, *planes = received.unbind(dim=2)
        # Adding nothing at text tokens, DeepStack may as well run on all of them.
        everywhere = torch.ones(embeds.shape[:2], dtype=torch.bool)
        out = net.model.language_model(
            inputs_embeds=embeds, position_ids=position_ids, visual_pos_masks=everywhere,
            deepstack_visual_embeds=[plane.flatten(0, 1) for plane in planes],
        )  # fmt: skip
        return net.lm_head(out.last_hidden_state)


TINY = TinyQwen3Vl()
