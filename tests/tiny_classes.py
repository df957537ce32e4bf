"""Tiny random instances of the image-text classes of the installed transformers: configurations shrunk by the names of
their fields, and inputs made from the arguments of ``get_image_features``."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

from tiny_families.base import IMAGE, VIDEO, VOCABULARY, spread

D, PATCH = 32, 4
LAYERS = 2
SMALL = {
    "hidden_size": D, "out_hidden_size": D, "text_hidden_size": D, "projection_dim": D, "projector_hidden_size": D,
    "projection_hidden_size": D, "projection_intermediate_size": 48, "embed_dim": D, "projector_input_dim": D, "projector_output_dim": D, "vision_output_dim": D,
    "intermediate_size": 48, "intermediate_size_mlp": 48, "moe_intermediate_size": 32, "ffn_dim": 48, "mlp_dim": 48,
    "dense_intermediate_size": 48, "shared_intermediate_size": 48, "shared_expert_intermediate_size": 32, "shared_experts_intermediate_size": 32,
    "share_expert_dim": 32, "moe_hidden_size": 32, "moe_shared_expert_intermediate_size": 32, "moe_latent_size": None,
    "num_hidden_layers": LAYERS, "depth": LAYERS, "n_layers": LAYERS, "num_attention_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "num_sliding_attention_heads": 4,
    "head_dim": 8, "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY, "max_position_embeddings": 512, "patch_size": PATCH, "image_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "top_k_experts": 2, "moe_k": 2, "n_shared_experts": 1, "moe_num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 512,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_head_dim": 8, "linear_num_heads": 4,
    "num_position_embeddings": 64, "num_patches": 64, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 2, "posemb_grid_size": 8,
    "word_embed_proj_dim": D, "encoder_hidden_size": D, "image_text_hidden_size": D, "num_query_tokens": 6, "output_channels": D, "num_pos_feats": 16,
    "resampler_n_latents": 6, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8,
    "d_model": D, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "output_dim": D, "downsample_hidden_size": 8, "num_mel_bins": 16,
    "sliding_window": 512, "attention_chunk_size": 512, "sliding_window_size": 512, "adapter_in_dim": D, "adapter_out_dim": D, "projection_hidden_dim": D,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO, "image_patch_id": IMAGE,
    "audio_token_id": 119, "audio_token_index": 119, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "window_size": 16, "n_window": 8, "downsample_channels": D, "n_window_infer": 16, "mm_tokens_per_image": 16, "max_image_size": 64, "img_max_token_num": 64,
}
LISTS = ("layer_types", "mlp_layer_types", "indexer_types", "no_rope_layers", "layer_rope_theta", "activation_sparsity_pattern", "rope_scaling_layers")
MARKERS = ["vision_start_token_id", "vision_end_token_id", "image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id"]


def shrink(config, values=SMALL):
    """Return the keywords of a small configuration of the same class."""
    out = {}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            out[key] = shrink(value, values)
        elif key in LISTS and isinstance(value, (list, tuple)):
            out[key] = list(dict.fromkeys(value))[:LAYERS]
            out[key] = (out[key] * LAYERS)[:LAYERS]
        elif key in MARKERS and value is not None:
            out[key] = 111 + MARKERS.index(key) % 2 + 2 * (MARKERS.index(key) // 4)
        elif key in values and (value is not None or key in ("image_token_id", "image_token_index", "video_token_id")):
            out[key] = values[key]
            if isinstance(value, (list, tuple)) and not isinstance(values[key], (list, tuple)):
                out[key] = [values[key]] * min(len(value), 2)
        elif key.startswith("_") or key in ("dtype", "transformers_version", "architectures", "model_type"):
            continue
    return out


def merged(base, changes):
    for key, value in changes.items():
        base[key] = merged(dict(base.get(key) or {}), value) if isinstance(value, dict) and key.endswith("config") else value
    return base


def build(kind, changes=None):
    values = merged(shrink(CONFIG_MAPPING[kind]()), CHANGES.get(kind, {}) if changes is None else changes)
    config = CONFIG_MAPPING[kind](**values)
    cls = getattr(transformers, NAMES[kind] if isinstance(NAMES[kind], str) else NAMES[kind][0])
    torch.manual_seed(0)
    net = cls(config)
    net.generation_config.eos_token_id = None
    net.generation_config.pad_token_id = 0
    net.generation_config.suppress_tokens = [0, *range(110, VOCABULARY)]
    return spread(net.float())


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
CHANGES = {
    "apertus1p5": {"text_config": {"vocab_size": 400}, "vision_config": {"codebook_size": 64, "base_channels": 32, "num_res_blocks": 1, "embed_dim": 16, "latent_channels": 16}, "image_token_offset": 128, "audio_token_offset": 192, "audio_config": {"codebook_dim": 32, "codebook_size": 64}},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE, **{f"IMGIMG{'ABCD'[i]}{'ABCD'[j]}Z": 60 + 4 * i + j for i in range(4) for j in range(4)}}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": MROPE}, "layer_types": ["full_attention"] * 2}, "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "cosmos3_edge": {"text_config": {"rope_parameters": MROPE}},
    "cosmos3_omni": {"text_config": {"rope_parameters": MROPE}, "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}, "moe_intermediate_size": [32, 16]}},
    "exaone4_5": {"text_config": {"model_type": "exaone4"}},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": MROPE}},
    "hy_v4_vl": {"text_config": {"rope_parameters": MROPE, "num_key_value_heads": 4}},
    "emu3": {"vocabulary_map": {"<image>": IMAGE, **{f"<|visual token {i:06}|>": 40 + i for i in range(16)}, "<|extra_200|>": 39}, "image_token_id": IMAGE},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "glm_ocr": {"text_config": {"rope_parameters": MROPE}},
    "glmga": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": MROPE}, "vision_config": {"fullatt_block_indexes": [1]}},
    "qwen3_omni_moe_thinker": {"text_config": {"rope_parameters": MROPE}, "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen4_exp": {"text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 512, "indexer_compress_ratio": 4, "output_gate_type": "sigmoid"}},
    "minicpmv4_7": {"text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}, "insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "minicpmv4_6": {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "minicpm_ocr": {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}, "vision_config": {"num_position_embeddings": 64, "image_size": [32, 32]}},
    "granite4_vision": {"qformer_config": {"cross_attention_frequency": 1}, "downsample_rate": "1/2", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0, 1, 0, 1], "spatial_vision_layer": -1},
    "granite_docling": {"vision_config": {"deepstack_visual_indexes": [0], "scale_factor": 2}},
    "deepseek_ocr2": {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}, "encoder_config": {"num_key_value_heads": 2}}, "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "muse_spark": {"audio_config": {"patch_sizes": [16, 6], "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2, "out_hidden_size": D}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "hyperclovax_vision_v2": {"vision_config": {"fullatt_block_indexes": [1]}},
    "aria": {"projector_patch_to_query_dict": {64: 8}},
}


def image_inputs(kind, net):
    """Return candidates for what ``get_image_features`` takes, two images each."""
    owner = net if hasattr(net, "get_image_features") else net.model
    names = set()
    for part in (owner, getattr(net, "model", owner)):
        if hasattr(type(part), "get_image_features"):
            names |= set(inspect.signature(type(part).get_image_features).parameters)
    config = net.config
    vision = getattr(config, "vision_config", None) or getattr(config, "vq_config", None)
    g = torch.Generator().manual_seed(1)
    def randn(*shape): return torch.randn(*shape, generator=g)
    p = getattr(vision, "patch_size", PATCH)
    p = p if isinstance(p, int) else p[0]
    if "image_grid_thw" in names:
        grids = torch.tensor([[1, 6, 4], [1, 4, 8]])
        n = int(grids.prod(-1).sum())
        for shape in [(n, 3 * 2 * p * p), (n, 3 * p * p), (n, 3, p, p), (4 * n, 3 * p * p), (4 * n, 3 * 2 * p * p), (4 * n, 3, p, p), (n, 2, p, p, 3)]:
            yield {"pixel_values": randn(*shape), "image_grid_thw": grids}
    elif "target_sizes" in names:
        sizes = torch.tensor([[8, 4], [4, 8]], dtype=torch.int32)
        yield {"pixel_values": randn(1, 3, p, int(sizes.prod(-1).sum()) * p), "target_sizes": sizes}
    elif "image_position_ids" in names:
        side = 8
        grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")[::-1], -1).reshape(1, -1, 2)
        for width in (3 * p * p, 3 * p * p * getattr(vision, "pooling_kernel_size", 1) ** 2):
            yield {"pixel_values": randn(2, side * side, width), "image_position_ids": grid.repeat(2, 1, 1)}
    elif "image_token_pooling" in names:
        pooling = torch.arange(64).reshape(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
        yield {"pixel_values": randn(2, 64, 3 * p * p), "image_token_pooling": torch.cat([pooling, pooling + 64]), "image_grids": torch.tensor([[0, 0, 4, 4]] * 2), "image_num_crops": torch.tensor([1, 1])}
    elif "image_grid_hw" in names:
        grids = torch.tensor([[4, 4], [4, 4]])
        yield {"pixel_values": randn(2, 3, 4 * p, 4 * p), "image_grid_hw": grids}
        yield {"pixel_values": randn(32, 3 * p * p), "image_grid_hw": grids}
    else:
        extra = {}
        if "qformer_input_ids" in names:
            extra = {"qformer_input_ids": torch.tensor([[5, 6, 7]] * 2), "qformer_attention_mask": torch.ones(2, 3, dtype=torch.long)}
        if "image_sizes" in names:
            extra["image_sizes"] = torch.tensor([[32, 32]] * 2)
        if "high_res_pixel_values" in names:
            extra["high_res_pixel_values"] = randn(2, 3, 32, 32)
        side = getattr(vision, "image_size", 32) or 32
        side = side if isinstance(side, int) else side[0]
        for shape in [(2, 3, side, side), (2, 1, 3, side, side), (2, 2, 3, side, side), (2, 3, 64, 64)]:
            yield {"pixel_values": randn(*shape), **extra}


def features(net, inputs):
    owner = net if hasattr(net, "get_image_features") else net.model
    names = set()
    for part in (owner, getattr(net, "model", owner)):
        if hasattr(type(part), "get_image_features"):
            names |= set(inspect.signature(type(part).get_image_features).parameters)
    return owner.get_image_features(**{k: v for k, v in inputs.items() if k in names}, return_dict=True)


def lengths_of(output):
    x = output.pooler_output
    if x is None:
        x = output.last_hidden_state
    if isinstance(x, Tensor):
        return [x.shape[1]] * len(x) if x.dim() == 3 else [len(x) // 2] * 2
    return [len(y) for y in x]
