"""Tiny random instances of the image-text classes of the installed transformers, and two prompts with an image each.

A configuration is made small by the names of its fields (`SMALL`), and by hand where these have to fit each other
(`CHANGES`). The tensors that a model takes follow from the arguments of ``get_image_features``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

from foveate.families.classes import owner_of
from tiny_families.base import IMAGE, PAD, VIDEO, VOCABULARY, spread

D, PATCH, LAYERS, WINDOW = 32, 4, 2, 512
START, END, AUDIO = 111, 112, 119

_BY_VALUE: list[tuple[Any, str]] = [
    (D, "hidden_size out_hidden_size text_hidden_size projection_dim projector_hidden_size projection_hidden_size "
        "embed_dim projector_input_dim projector_output_dim vision_output_dim word_embed_proj_dim encoder_hidden_size "
        "image_text_hidden_size output_channels d_model output_dim adapter_in_dim adapter_out_dim "
        "projection_hidden_dim downsample_channels moe_hidden_size moe_intermediate_size share_expert_dim "
        "shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    (48, "projection_intermediate_size intermediate_size intermediate_size_mlp ffn_dim mlp_dim encoder_ffn_dim "
         "dense_intermediate_size shared_intermediate_size"),
    (LAYERS, "num_hidden_layers depth n_layers num_key_value_heads swa_num_key_value_heads num_experts_per_tok "
             "moe_topk top_k_experts moe_k index_n_heads linear_num_key_heads linear_num_value_heads pos_emb_time"),
    (4, "num_attention_heads num_heads swa_num_attention_heads num_sliding_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts linear_num_heads resampler_n_heads "
        "encoder_attention_heads"),
    (8, "head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim pos_emb_height pos_emb_width posemb_grid_size resampler_head_dim "
        "downsample_hidden_size hidden_size_per_layer_input n_window"),
    (16, "kv_lora_rank q_lora_rank num_pos_feats window_size n_window_infer mm_tokens_per_image num_mel_bins "
         "num_embeddings"),
    (1, "n_group topk_group first_k_dense_replace n_shared_experts moe_num_shared_experts resampler_depth "
        "encoder_layers bos_token_id"),
    (6, "num_query_tokens resampler_n_latents"),
    (64, "num_position_embeddings num_patches max_image_size img_max_token_num"),
    (WINDOW, "max_position_embeddings index_topk sliding_window attention_chunk_size sliding_window_size"),
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (PATCH, "patch_size"), (32, "image_size"), (PAD, "pad_token_id"), (None, "eos_token_id moe_latent_size"),
    (IMAGE, "image_token_id image_token_index image_patch_id"), (VIDEO, "video_token_id video_token_index"),
    (AUDIO, "audio_token_id audio_token_index"),
    (START, "vision_start_token_id image_start_token_id"), (END, "vision_end_token_id image_end_token_id"),
    (114, "video_start_token_id"), (115, "video_end_token_id"),
]  # fmt: skip
SMALL: dict[str, Any] = {name: value for value, names in _BY_VALUE for name in names.split()}
_PER_LAYER = (
    "layer_types", "mlp_layer_types", "indexer_types", "no_rope_layers", "layer_rope_theta",
    "activation_sparsity_pattern", "rope_scaling_layers",
)  # fmt: skip
_OPTIONAL = ("image_token_id", "image_token_index", "video_token_id")

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
PARTIAL = {**MROPE, "partial_rotary_factor": 1.0}
ALL_HEADS: dict[str, Any] = {"text_config": {"num_key_value_heads": 4}}
MERGED = {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}}
WHOLE = {"vision_config": {"fullatt_block_indexes": [1]}}
DEEP = {"text_config": {"rope_parameters": MROPE}, "vision_config": {"deepstack_visual_indexes": [0, 1]}}
LISTENS = {"vision_start_token_id": START, "audio_start_token_id": 113, "user_token_id": 3}
CODES = {"base_channels": 32, "num_res_blocks": 1, "codebook_size": 16}
CHANGES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "text_config": {"vocab_size": 400}, "audio_config": {"codebook_dim": D, "codebook_size": 64},
        "vision_config": {**CODES, "codebook_size": 64, "embed_dim": 16, "latent_channels": 16},
        "image_token_offset": 128, "audio_token_offset": 192,
    },
    "aria": {"projector_patch_to_query_dict": {64: 8}},
    "chameleon": {
        "vq_config": {"base_channels": 32, "num_res_blocks": 1, "latent_channels": 16, "embed_dim": 16},
        "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMG{x}{y}Z": 60 + 4 * i + j for i, x in enumerate("ABCD")
                                                for j, y in enumerate("ABCD")}},
    },
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": MROPE}, "layer_types": ["full_attention"] * 2},
        "vision_config": {"deepstack_visual_indexes": [0, 1]},
    },
    "cosmos3_edge": {"text_config": {"rope_parameters": MROPE}},
    "cosmos3_omni": DEEP,
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"downsample_channels": [D, D]}, "encoder_config": {"num_key_value_heads": 2}},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0, 1]}},
    "dots3_note": {**ALL_HEADS, "audio_config": {"num_key_value_heads": 4, "adapter_input_size": D}},
    "emu3": {
        "vq_config": {**CODES, "channel_multiplier": [1, 1, 1], "num_attention_heads": 1, "embed_dim": 4},
        "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 39,
                           **{f"<|visual token {i:06}|>": 40 + i for i in range(16)}},
    },
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}, "moe_intermediate_size": [32, 16]},
    },
    "exaone4_5": {"text_config": {"model_type": "exaone4"}, **WHOLE},
    "gemma3n": {
        "text_config": {"num_kv_shared_layers": 0, "laurel_rank": 4}, "vision_soft_tokens_per_image": 16,
        "audio_config": {"conf_num_hidden_layers": 1},
    },
    "gemma4": {
        "text_config": {"global_head_dim": 8},
        "vision_config": {
            "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
            "num_key_value_heads": 4, "patch_size": PATCH, "pooling_kernel_size": 2, "position_embedding_size": 64,
        },
    },
    "gemma4_unified": {"vision_config": {}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}},
    "glm_ocr": {"text_config": {"rope_parameters": MROPE}},
    "glmga": {"text_config": {"rope_parameters": MROPE}},
    "glm46v": {"text_config": {"rope_parameters": MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": PARTIAL}},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 1, 1]}}},
    "hy_v4_vl": {"text_config": {"rope_parameters": MROPE, "num_key_value_heads": 4}},
    "hyperclovax_vision_v2": WHOLE,
    "kimi_k25": {"text_config": {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"]}},
    "llama4": {
        "text_config": {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1], "moe_layers": [1]},
        "vision_config": {"intermediate_size": 128},
    },
    "minicpm_ocr": MERGED,
    "minicpmv4_6": MERGED,
    "minicpmv4_7": {"text_config": {"rope_parameters": PARTIAL}, **MERGED},
    "mistral_large4": ALL_HEADS,
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [1, 0]},
        "vision_config": {"num_position_embeddings": 64, "image_size": [32, 32]},
    },
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config": {"patch_sizes": [16, 6], "hidden_sizes": [16, D], "depths": [1, 1], "num_hidden_layers": 2},
    },
    "nemotron_h_omni": {
        "vision_hidden_size": D,
        "vision_config": {
            "video_temporal_patch_size": 2, "patch_dim": 48, "video_patch_dim": 96, "max_img_size": 64,
            "num_cls_tokens": 1, "num_registers": 1, "summary_idxs": [0],
        },
    },
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": MROPE}, **WHOLE, **LISTENS},
    "qwen3_omni_moe_thinker": {**DEEP, **LISTENS},
    "qwen3_vl_moe": DEEP,
    "qwen3_5_moe": {"text_config": {"rope_parameters": PARTIAL}},
    "qwen4_exp": {
        "text_config": {
            "rope_parameters": PARTIAL, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
            "indexer_budget": WINDOW, "indexer_compress_ratio": 4, "output_gate_type": "sigmoid",
        },
    },
    "step3p7": {"text_config": {"sliding_window": WINDOW}},
}  # fmt: skip


def shrunk(config: Any) -> dict[str, Any]:
    """Return the arguments of a small configuration of the same class."""
    values: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            values[key] = shrunk(value)
        elif key in _PER_LAYER and isinstance(value, list | tuple):
            values[key] = (list(dict.fromkeys(value))[:LAYERS] * LAYERS)[:LAYERS]
        elif key in SMALL and (value is not None or key in _OPTIONAL):
            several = isinstance(value, list | tuple)
            values[key] = [SMALL[key]] * min(len(value), 2) if several else SMALL[key]
    return values


def changed(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a configuration with some of them changed, those of its parts one by one."""
    parts = {k: changed(dict(values.get(k) or {}), v) for k, v in changes.items() if k.endswith("_config")}
    return {**values, **changes, **parts}


def class_of(kind: str) -> Any:
    names = NAMES[kind]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def build(kind: str, **changes: Any) -> Any:
    """Make the tiny instance of a model type."""
    config = CONFIG_MAPPING[kind](**changed(changed(shrunk(CONFIG_MAPPING[kind]()), CHANGES.get(kind, {})), changes))
    torch.manual_seed(0)
    net = class_of(kind)(config)
    net.generation_config.eos_token_id = None
    net.generation_config.pad_token_id = PAD
    net.generation_config.suppress_tokens = [PAD, *range(110, VOCABULARY)]
    return spread(net.float())


def batch(net: Any) -> dict[str, Tensor]:
    """Make two prompts with an image each, padded on the left."""
    names = _argument_names(net)
    for inputs in _pictures(net, names):
        try:
            lengths = _lengths(net, {k: x for k, x in inputs.items() if k in names})
        except (RuntimeError, ValueError, TypeError):  # classes take patches in many shapes
            continue
        return {**inputs, **_prompts(net, lengths)}
    raise AssertionError(f"no picture fits {type(net).__name__}")


def _prompts(net: Any, lengths: list[int]) -> dict[str, Tensor]:
    texts = [([5, 6, 7], [8, 9, 10, 11]), ([12], [13, 14])]
    rows = [[*a, START, *[IMAGE] * n, END, *b] for n, (a, b) in zip(lengths, texts, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    planes = {"mm_token_type_ids": ids == IMAGE, "token_type_ids": ids == IMAGE}
    planes["moe_mm_token_type_ids"] = (ids == IMAGE) | (ids == START) | (ids == END)
    taken = inspect.signature(type(net).forward).parameters
    types = {key: plane.long() for key, plane in planes.items() if key in taken}
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **types}


def _argument_names(net: Any) -> set[str]:
    """Return what ``get_image_features`` takes, in a model and in the one inside."""
    encoders = [getattr(type(part), "get_image_features", None) for part in (net, getattr(net, "model", net))]
    return {name for encode in encoders if encode is not None for name in inspect.signature(encode).parameters}


def _lengths(net: Any, inputs: dict[str, Tensor]) -> list[int]:
    """Return how many tokens each image makes."""
    with torch.no_grad():
        output = owner_of(net, "get_image_features").get_image_features(**inputs, return_dict=True)
    rows = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    if isinstance(rows, Tensor) and rows.dim() == 2:
        return [len(rows) // 2] * 2
    return [len(x) for x in rows]


def _pictures(net: Any, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """Yield what the encoder may take for two images."""
    config, generator = net.config, torch.Generator().manual_seed(1)
    vision = getattr(config, "vision_config", None) or getattr(config, "vq_config", None)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    side = getattr(vision, "patch_size", PATCH)
    p = side if isinstance(side, int) else side[0]
    if "image_grid_thw" in names:
        grids = torch.tensor([[1, 6, 4], [1, 4, 8]])
        further = {"image_merge_sizes": torch.tensor([2, 2])} if "image_merge_sizes" in names else {}
        n = int(grids.prod(-1).sum())
        flat = [(m, c * 3 * p * p) for m in (n, 4 * n) for c in (2, 1)]
        for shape in [*flat, (n, 3, p, p), (n, 2, p, p, 3), (n, 2 * p, 2 * p, 3)]:
            yield {"pixel_values": noise(*shape), "image_grid_thw": grids, **further}
    elif "target_sizes" in names:
        sizes = torch.tensor([[8, 8], [4, 12]], dtype=torch.int32)
        yield {"pixel_values": noise(1, 3, p, int(sizes.prod(-1).sum()) * p), "target_sizes": sizes}
    elif "image_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(-1).repeat(2, 1, 1)
        for width in (3 * p * p, 3 * p * p * getattr(vision, "pooling_kernel_size", 1) ** 2):
            yield {"pixel_values": noise(2, 64, width), "image_position_ids": places}
    elif "image_token_pooling" in names:
        pooled = torch.arange(64).reshape(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
        yield {
            "pixel_values": noise(2, 64, 3 * p * p), "image_token_pooling": torch.cat([pooled, pooled + 64]),
            "image_grids": torch.tensor([[0, 0, 4, 4]] * 2), "image_num_crops": torch.tensor([1, 1]),
        }  # fmt: skip
    elif "image_grid_hw" in names:
        yield {"pixel_values": noise(32, 3 * p * p), "image_grid_hw": torch.tensor([[4, 4], [4, 4]])}
    else:
        further = {"image_sizes": torch.tensor([[32, 32]] * 2)} if "image_sizes" in names else {}
        if "high_res_pixel_values" in names:
            further["high_res_pixel_values"] = noise(2, 3, 32, 32)
        for shape in [(2, 3, 32, 32), (2, 1, 3, 32, 32)]:
            yield {"pixel_values": noise(*shape), **further}
