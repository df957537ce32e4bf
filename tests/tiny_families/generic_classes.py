"""Models that the generic family takes, of different vision towers: the picture's grid is that of its tokens."""

import inspect
import sys

import torch
import transformers as hf

from tiny_families.base import IMAGE, VIDEO, Tiny, picture, text_shape
from tiny_families.mistral3 import padded, pixtral_config, place

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
PATCH, MERGE = 4, 2


class Packed(Tiny):
    """Patches of all pictures one behind the other, the 2 x 2 of a token side by side, as Qwen-VL has them."""

    visuals = ((6, 4), (4, 4), (3, 8))
    whole_grid = None
    depth = 2
    """Pictures of which a patch is made: one, or the same twice for want of a film."""

    def place(self, what, generator):
        h, w = what
        pixels = self.pixels(generator, h * w * MERGE**2)
        return {
            "ids": [IMAGE] * (h * w),
            "pixel_values": [pixels],
            "image_grid_thw": [torch.tensor([[1, h * MERGE, w * MERGE]])],
        }

    def pixels(self, generator, patches):
        return picture(generator, patches, 3 * self.depth * PATCH**2)

    def patches(self, inputs):
        """Return the patches of each token, in the order of the tower."""
        return torch.arange(len(inputs["pixel_values"])).reshape(-1, MERGE**2).tolist()


class KimiK25(Packed):
    name = "kimi_k25"

    def build(self):
        text = hf.DeepseekV3Config(
            **text_shape(num_key_value_heads=4), moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=8, first_k_dense_replace=4,
        )  # fmt: skip
        vision = {**VISION, "patch_size": PATCH, "pos_emb_height": 8, "pos_emb_width": 8}
        return hf.Kimi_K25ForConditionalGeneration(
            hf.Kimi_K25Config(
                vision_config=vision, text_config=text, projection_hidden_size=32, image_token_id=IMAGE,
                video_token_id=VIDEO, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def pixels(self, generator, patches):
        return picture(generator, patches, 3, PATCH, PATCH)

    def patches(self, inputs):
        """Rows of patches lie one behind the other here."""
        found, start = [], 0
        for _, h, w in inputs["image_grid_thw"].tolist():
            raster = torch.arange(start, start + h * w).reshape(h // 2, 2, w // 2, 2)
            found += raster.transpose(1, 2).reshape(-1, 4).tolist()
            start += h * w
        return found


class Exaone45(Packed):
    """Windows of 2 x 2 tokens in all layers but the last, and fewer heads of keys than of queries."""

    name = "exaone4_5"
    positions = ("compact",)  # its generate throws position ids away

    def build(self):
        vision = {
            "depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
            "num_key_value_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "window_size": 16,
            "fullatt_block_indexes": [2],
        }  # fmt: skip
        return hf.Exaone4_5_ForConditionalGeneration(
            hf.Exaone4_5_Config(
                vision_config=vision, text_config=hf.Exaone4Config(**text_shape()), image_token_id=IMAGE,
                video_token_id=VIDEO,
            )
        )  # fmt: skip

    def patches(self, inputs):
        from foveate.families.qwen2_5_vl import window_order

        found, start = [], 0
        for _, h, w in inputs["image_grid_thw"].tolist():
            order = window_order((h // 2, w // 2), 2).argsort()
            found += [list(range(start + 4 * i, start + 4 * i + 4)) for i in order.tolist()]
            start += h * w
        return found


class VideoLlama3(Packed):
    name = "video_llama_3"
    depth = 1

    def build(self):
        return hf.VideoLlama3ForConditionalGeneration(
            hf.VideoLlama3Config(
                vision_config={**VISION, "patch_size": PATCH}, text_config=hf.Qwen2Config(**text_shape()),
                image_token_id=IMAGE, video_token_id=VIDEO,
            )
        )  # fmt: skip

    def place(self, what, generator):
        return {**super().place(what, generator), "image_merge_sizes": [torch.tensor([MERGE])]}


class MuseGlimmer(Packed):
    """Attention within windows in layers that the configuration names by their types."""

    name = "muse_glimmer"
    visuals = ((6, 4), (4, 4), (3, 6))

    def build(self):
        vision = {**VISION, "patch_size": PATCH, "pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64}
        return hf.MuseGlimmerForConditionalGeneration(
            hf.MuseGlimmerConfig(
                vision_config=vision, text_config={**text_shape(), "head_dim": 8}, image_token_id=IMAGE,
                video_token_id=VIDEO, out_hidden_size=128, projector_hidden_size=32,
            )
        )  # fmt: skip

    def patches(self, inputs):
        from foveate.families.qwen2_5_vl import window_order

        found, start = [], 0
        for _, h, w in inputs["image_grid_thw"].tolist():
            place = start + window_order((h, w), 8).argsort()
            found += place.reshape(h // 2, 2, w // 2, 2).transpose(1, 2).reshape(-1, 4).tolist()
            start += h * w
        return found


class MinimaxM3(Packed):
    name = "minimax_m3_vl"

    def build(self):
        text = {
            **text_shape(), "head_dim": 8, "rotary_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1,
            "dense_intermediate_size": 48, "shared_intermediate_size": 16,
        }  # fmt: skip
        vision = {**VISION, "hidden_size": 48, "patch_size": PATCH, "image_size": 64}
        return hf.MiniMaxM3SparseForConditionalGeneration(
            hf.MiniMaxM3VLConfig(
                vision_config=vision, text_config=text, image_token_index=IMAGE, video_token_index=VIDEO,
                projector_hidden_size=32,
            )
        )  # fmt: skip


class Gemma4(Tiny):
    """Patches of every picture padded to the same number, and pooled by where they lie."""

    name = "gemma4"
    positions = ("original",)  # the plain LLM takes no embeddings without ids, by which its layers embed them again
    visuals = ((6, 4), (4, 4), (3, 8))
    whole_grid = None
    room = 112
    type_plane = "mm_token_type_ids"

    def build(self):
        vision = hf.Gemma4VisionConfig(
            **VISION, num_key_value_heads=2, head_dim=16, patch_size=PATCH, pooling_kernel_size=MERGE,
            position_embedding_size=64,
        )  # fmt: skip
        text = hf.Gemma4TextConfig(
            **text_shape(), head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=128, layer_types=["full_attention", "full_attention"],
        )  # fmt: skip
        return hf.Gemma4ForConditionalGeneration(
            hf.Gemma4Config(
                vision_config=vision, text_config=text, audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO
            )
        )

    def place(self, what, generator):
        h, w = (2 * side for side in what)
        pixels, places = torch.full((1, self.room, 3 * PATCH**2), 7.0), torch.full((1, self.room, 2), -1)
        pixels[0, : h * w] = picture(generator, h * w, 3 * PATCH**2)
        places[0, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1)
        return {"ids": [IMAGE] * (h * w // 4), "pixel_values": [pixels], "image_position_ids": [places]}

    def patches(self, inputs):
        found = []
        for i, places in enumerate(inputs["image_position_ids"]):
            there = places[places[:, 0] >= 0]
            width, tokens = int(there[:, 0].max()) // 2 + 1, {}
            for j, (x, y) in enumerate(there.tolist()):
                tokens.setdefault(y // 2 * width + x // 2, []).append(i * self.room + j)
            found += [tokens[t] for t in sorted(tokens)]
        return found


class Molmo2(Tiny):
    """Two crops per picture; tokens attend to the two or four patches that they are made of, of two layers."""

    name = "molmo2"
    visuals = ((2, 2), (2, 1), (1, 2))
    whole_grid = None

    def build(self):
        vision = {
            **VISION, "num_key_value_heads": 2, "head_dim": 16, "patch_size": PATCH, "image_size": [16, 16],
            "num_position_embeddings": 16,
        }  # fmt: skip
        adapter = {
            "vision_feature_layer": [-1, -2], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 16, "intermediate_size": 48, "text_hidden_size": 32,
        }  # fmt: skip
        text = {**text_shape(), "head_dim": 8, "additional_vocab_size": 4}
        return hf.Molmo2ForConditionalGeneration(
            hf.Molmo2Config(vision_config=vision, adapter_config=adapter, text_config=text, image_patch_id=IMAGE)
        )

    def place(self, what, generator):
        h, w = what
        whole = torch.arange(16).reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
        second = torch.cat([whole[:, :2] + 16, torch.full((4, 2), -1)], dim=1)[: h * w]
        return {
            "ids": [IMAGE] * (4 + h * w),
            "pixel_values": [picture(generator, 2, 16, 3 * PATCH**2)],
            "image_token_pooling": [torch.cat([whole, second])],
            "image_grids": [torch.tensor([[2, 2, h, w]])],
        }

    def collate(self, inputs):
        pools = [x for row in inputs["image_token_pooling"] for x in row]
        moved = [torch.where(x < 0, x, x + 32 * i) for i, x in enumerate(pools)]
        return {**super().collate({**inputs, "image_token_pooling": [moved]})}

    def patches(self, inputs):
        return [[i for i in row if i >= 0] for row in inputs["image_token_pooling"].tolist()]


class QianfanOcr(Tiny):
    """Tiles with a `[CLS]` token in front, and pixel shuffle."""

    name = "qianfan_ocr"
    visuals = ((32, 32), (32, 32), (32, 32))

    def build(self):
        vision = {**VISION, "image_size": (32, 32), "patch_size": (PATCH, PATCH)}
        return hf.QianfanOCRForConditionalGeneration(
            hf.QianfanOCRConfig(
                vision_config=vision, text_config=hf.Qwen3Config(**text_shape(), head_dim=8), image_token_id=IMAGE,
                image_seq_length=16,
            )
        )  # fmt: skip

    def place(self, what, generator):
        return {"ids": [IMAGE] * 16, "pixel_values": [picture(generator, 1, 3, *what)]}

    def patches(self, inputs):
        # The shuffle swaps rows and columns twice, so that tokens are in raster order.
        blocks = torch.arange(64).reshape(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
        return torch.cat([blocks + 64 * i for i in range(len(inputs["pixel_values"]))]).tolist()


class MistralLarge4(Tiny):
    """Pixtral's tower: one sequence of all pictures under a mask of blocks."""

    name = "mistral_large4"
    visuals = ((64, 48), (32, 64), (48, 48))
    whole_grid = None

    def build(self):
        text = {
            **text_shape(num_key_value_heads=4), "moe_intermediate_size": 16, "n_routed_experts": 2,
            "num_experts_per_tok": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "index_head_dim": 8, "index_n_heads": 2,
        }  # fmt: skip
        return hf.MistralLarge4ForConditionalGeneration(
            hf.MistralLarge4Config(vision_config=pixtral_config(), text_config=text, image_token_index=IMAGE)
        )

    def place(self, what, generator):
        return place(what, 8, generator)

    def collate(self, inputs):
        return padded(inputs)

    def patches(self, inputs):
        found, start = [], 0
        for height, width in inputs["image_sizes"].tolist():
            h, w = height // PATCH, width // PATCH
            raster = torch.arange(start, start + h * w).reshape(h // 2, 2, w // 2, 2)
            found += raster.transpose(1, 2).reshape(-1, 4).tolist()
            start += h * w
        return found


def _there(tiny):
    """Return whether the installed transformers has a class, and keeps the pictures that it encodes apart."""
    if isinstance(tiny, MinimaxM3):
        return "cu_seqlens" in inspect.getsource(sys.modules[hf.MiniMaxM3VLVisionModel.__module__])
    return hasattr(
        hf, {"molmo2": "Molmo2Config", "mistral_large4": "MistralLarge4Config"}.get(tiny.name, "Gemma4Config")
    )


GENERICS = {
    tiny.name: tiny
    for tiny in (
        Exaone45(), Gemma4(), KimiK25(), MinimaxM3(), MistralLarge4(), Molmo2(), MuseGlimmer(), QianfanOcr(),
        VideoLlama3(),
    )
    if _there(tiny)
}  # fmt: skip
