"""Models to count: built-in shapes by name, and configurations from a folder or the hub. No weights are read."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig

from foveate.core.errors import UnknownNameError, did_you_mean
from foveate.measure.loading import first_line

_VICUNA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
}  # fmt: skip
_VICUNA_13B = {
    **_VICUNA_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 40,
}  # fmt: skip
_QWEN2_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
_CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
_SIGLIP_SO = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
_QWEN_PIXELS = {"image_processor_type": "Qwen2VLImageProcessor", "temporal_patch_size": 2, "merge_size": 2}


@dataclass(frozen=True)
class Shape:
    """The configuration of a model, and of its image processor if what an image comes to depends on it."""

    config: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=dict)


SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Shape({"model_type": "llava", "vision_config": _CLIP_L, "text_config": _VICUNA_7B}),
    "llava-1.5-13b": Shape({"model_type": "llava", "vision_config": _CLIP_L, "text_config": _VICUNA_13B}),
    "llava-next-7b": Shape({"model_type": "llava_next", "vision_config": _CLIP_L, "text_config": _VICUNA_7B}),
    "video-llava-7b": Shape({
        "model_type": "video_llava", "vision_config": {**_CLIP_L, "image_size": 224}, "text_config": _VICUNA_7B,
    }),
    "llava-onevision-7b": Shape({
        "model_type": "llava_onevision", "text_config": {**_QWEN2_7B, "vocab_size": 152128},
        "vision_config": {**_SIGLIP_SO, "num_hidden_layers": 26, "image_size": 384},
    }),
    "qwen2-vl-7b": Shape(
        {
            "model_type": "qwen2_vl",
            "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 3584},
            "text_config": {**_QWEN2_7B, "model_type": "qwen2_vl_text", "rope_parameters": _ROPE},
        },
        {**_QWEN_PIXELS, "patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056},
    ),
    "qwen2.5-vl-7b": Shape(
        {
            "model_type": "qwen2_5_vl",
            "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
                "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14,
            },
            "text_config": {**_QWEN2_7B, "model_type": "qwen2_5_vl_text", "rope_parameters": _ROPE},
        },
        {**_QWEN_PIXELS, "patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056},
    ),
    "qwen3-vl-8b": Shape(
        {
            "model_type": "qwen3_vl",
            "vision_config": {
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
                "patch_size": 16, "deepstack_visual_indexes": [8, 16, 24],
            },
            "text_config": {
                "model_type": "qwen3_vl_text", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                "rope_parameters": {**_ROPE, "rope_theta": 5000000.0, "mrope_section": [24, 20, 20]},
            },
        },
        {**_QWEN_PIXELS, "patch_size": 16, "min_pixels": 65536, "max_pixels": 16777216},
    ),
    "internvl3-8b": Shape(
        {
            "model_type": "internvl",
            "vision_config": {
                "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096,
                "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
            },
            "text_config": {**_QWEN2_7B, "vocab_size": 151674},
        },
        {
            "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 448, "width": 448},
            "crop_to_patches": True, "min_patches": 1, "max_patches": 12,
        },
    ),
    "gemma3-4b": Shape({
        "model_type": "gemma3", "mm_tokens_per_image": 256, "vision_config": {**_SIGLIP_SO, "image_size": 896},
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
            "sliding_window": 1024,
        },
    }),
}  # fmt: skip


def read_shape(shape: Shape) -> tuple[Any, Any]:
    """Return the configuration of a shape, and its image processor or `None`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder)
        if not shape.processor:
            return config, None
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(shape.processor), encoding="utf-8")
        return config, AutoImageProcessor.from_pretrained(folder)


def load_shape(name: str) -> tuple[Any, Any]:
    """Return the configuration of a model, and its image processor or `None`.

    Parameters
    ----------
    name
        ``"nano"``, the name of a built-in shape, a folder with ``config.json``, or a hub id, of which only the
        configuration files are fetched.

    Raises
    ------
    UnknownNameError
        If there is no such model; the message lists the built-in shapes.
    """
    if name == "nano":
        import foveate.nano as nano

        return AutoConfig.from_pretrained(nano.WEIGHTS), None
    if name in SHAPES:
        return read_shape(SHAPES[name])
    known = f"built-in shapes are nano, {', '.join(SHAPES)}; otherwise pass a hub id or a folder with config.json"
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # transformers checks few types in its files, and fails on them anyhow.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, StrictDataclassError) as error:
        raise UnknownNameError(f"no usable model configuration at {name!r}: {first_line(error)}") from error
    except OSError as error:
        raise UnknownNameError(f"no model configuration at {name!r}: {known}{did_you_mean(name, SHAPES)}") from error
    for part in config.sub_configs:
        if not isinstance(getattr(config, part, None), PreTrainedConfig | None):
            raise UnknownNameError(
                f"no usable model configuration at {name!r}: {part} is an object, not {getattr(config, part)!r}"
            )
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):  # not every model needs one to tell what an image comes to
        return config, None
    if hasattr(processor, "crop_to_patches"):
        processor.crop_to_patches = True  # as the whole processor of such models sets it
    return config, processor
