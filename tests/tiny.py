"""Tiny random models of every family, batches for them without processors, and tokens for methods."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from foveate.probes import ClsToken, Embeddings, Features, Keys, Query
from foveate.reducer import Reducer, get_method
from foveate.tokens import Crop, Span, VisualTokens

VOCABULARY, PAD, IMAGE, VIDEO = 128, 0, 120, 121
SIDE, PATCH, FRAMES = 8, 4, 2
PIXELS = SIDE * PATCH
PINPOINTS = [[PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS], [2 * PIXELS, 2 * PIXELS]]

FAMILIES = ["llava", "llava_next", "video_llava"]

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("random", {"seed": 3}),
    ("uniform", {}),
    ("pool", {}),
    ("downsample", {}),
    ("fastervlm", {}),
    ("vispruner", {}),
    ("vispruner", {"order": "rank", "important_ratio": 0.25, "step": 4}),
    ("vispruner", {"step": None}),
]
"""All methods, with the parameters beside `keep`."""


def method_id(entry: Any) -> str:
    name, config = entry
    return "-".join([name, *(f"{k}={v}" for k, v in config.items())])


def make(entry: tuple[str, dict[str, Any]], keep: Any) -> Reducer:
    return get_method(entry[0])(keep=keep, **entry[1])


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=PIXELS,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip


def _text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip


def spread(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give weights a scale at which attention is not flat and logits are far apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "class_embedding" in name or "image_newline" in name or ("embed" in name and p.dim() == 2):
                p.copy_(noise)
            elif p.dim() > 1:
                p.copy_(noise * (2.0 if "q_proj" in name or "k_proj" in name else 1.0) / p[0].numel() ** 0.5)
            else:
                p.add_(0.1 * noise)
    return module.eval()


@functools.cache
def _original(family: str) -> Any:
    shared = {"vision_config": vision_config(), "text_config": _text_config(), "image_token_id": IMAGE}
    shared |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    if family == "llava":
        built = LlavaForConditionalGeneration(LlavaConfig(**shared, image_seq_length=SIDE**2))
    elif family == "llava_next":
        built = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS))
    else:
        built = VideoLlavaForConditionalGeneration(VideoLlavaConfig(**shared, video_token_id=VIDEO))
    built.generation_config.eos_token_id = None
    built.generation_config.pad_token_id = PAD
    built.generation_config.suppress_tokens = [PAD, IMAGE, VIDEO]
    return spread(built)


def model(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    fresh = copy.deepcopy(_original(family)).to(dtype)
    fresh.set_attn_implementation(attention)
    return fresh


Part = int | str | tuple[int, int]
"""So many text tokens; "image" or "video"; or the height and width of a picture in tiles."""

VISUALS: dict[str, list[Part]] = {
    "llava": ["image", "image", "image"],
    "llava_next": [(24, 64), (64, 20), (64, 64)],
    "video_llava": ["video", "image", "video"],
}


def sample(*parts: Part, seed: int = 0) -> dict[str, list[Any]]:
    """Make one prompt from its parts; the same seed and parts make the same prompt in any batch."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, list[Any]] = {"ids": [], "images": [], "sizes": [], "videos": []}
    for part in parts:
        if isinstance(part, int):
            out["ids"] += torch.randint(3, 110, (part,), generator=generator).tolist()
        elif part == "video":
            out["videos"].append(torch.randn(FRAMES, 3, PIXELS, PIXELS, generator=generator))
            out["ids"] += [VIDEO] * FRAMES * (SIDE**2 + 1)
        elif part == "image":
            out["images"].append(torch.randn(3, PIXELS, PIXELS, generator=generator))
            out["ids"] += [IMAGE] * SIDE**2
        else:
            crops = image_size_to_num_patches(list(part), PINPOINTS, PIXELS)
            out["images"].append(torch.randn(crops, 3, PIXELS, PIXELS, generator=generator))
            out["sizes"].append(list(part))
            out["ids"] += [IMAGE] * packed_length(part, crops)
    return out


@functools.cache
def packed_length(size: tuple[int, int], crops: int) -> int:
    features = [torch.zeros(crops, SIDE**2, 32)]
    inner = _original("llava_next").model
    _, lengths = inner.pack_image_features(features, torch.tensor([size]), "default", inner.image_newline)
    return int(lengths[0])


def samples(family: str) -> list[dict[str, list[Any]]]:
    """Make three prompts of different lengths, the second with two pictures or videos."""
    a, b, c = VISUALS[family]
    return [sample(4, a, 5, seed=1), sample(2, b, 3, c, 6, seed=2), sample(1, c, 9, seed=3)]


def collate(rows: list[dict[str, list[Any]]], side: str = "left", labels: bool = False) -> dict[str, Tensor]:
    """Pad prompts to one batch of model inputs."""
    length = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["ids"])
        place = slice(length - n, length) if side == "left" else slice(0, n)
        ids[i, place] = torch.tensor(row["ids"])
        mask[i, place] = 1
    out = {"input_ids": ids, "attention_mask": mask}
    if images := [x for row in rows for x in row["images"]]:
        if sizes := [x for row in rows for x in row["sizes"]]:
            most = max(len(x) for x in images)
            # The fillers are no zeros: nobody may look at them.
            images = [torch.cat([x, torch.full((most - len(x), *x.shape[1:]), 7.0)]) for x in images]
            out["image_sizes"] = torch.tensor(sizes)
        out["pixel_values"] = torch.stack(images)
    if videos := [x for row in rows for x in row["videos"]]:
        out["pixel_values_videos"] = torch.stack(videos)
    if labels:
        # A row's first token would be predicted from padding, or not at all.
        first = mask.cumsum(1) == 1
        out["labels"] = ids.masked_fill((mask == 0) | first | (ids == IMAGE) | (ids == VIDEO), -100)
    return out


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def visual_tokens(
    reducer: Reducer,
    layout: list[tuple[int, list[tuple[int, int]]]],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    only: int | None = None,
) -> VisualTokens:
    """Make tokens for a method: per span the row of its prompt and the grids of its crops.

    Each crop is followed by a separator. Values depend on the span and the crop alone, so that `only` one span of a
    layout (whose prompt then is row 0) has the values that it has among the others.
    """
    spans: list[Span] = []
    queries: list[tuple[int, Tensor]] = []
    planes: dict[Any, list[Tensor]] = {
        probe: [] for probe in (Features(), *reducer.probes()) if not isinstance(probe, Query | ClsToken)
    }
    for i, (row, grids) in enumerate(layout):
        if only not in (None, i):
            continue
        crops, start = [], 0
        for j, (h, w) in enumerate(grids):
            crops.append(Crop(torch.arange(start, start + h * w), (h, w)))
            start += h * w + 1
            generator = torch.Generator().manual_seed(1000 * seed + 10 * i + j)
            for probe, plane in planes.items():
                values = torch.randn(h * w, *_width(probe), generator=generator)
                plane.append((values if isinstance(probe, FEATURES) else values.exp()).to(dtype))
        sample_row = 0 if only is not None else row
        ordinal = sum(s.sample == sample_row for s in spans)
        spans.append(Span("image", sample_row, ordinal, torch.arange(start), (len(grids), *grids[0]), tuple(crops)))
        # Prompts of different lengths, the same words for the same prompt.
        generator = torch.Generator().manual_seed(1000 * seed + row)
        queries.append((sample_row, torch.randn(3 + row % 2, 12, generator=generator).to(dtype)))
    words = tuple(dict(queries).values()) if Query() in reducer.probes() else None
    cls = ClsToken() in reducer.probes()
    return VisualTokens(tuple(spans), planes, torch.device("cpu"), cls=cls, queries=words)


FEATURES = (Features, Embeddings, Keys)


def _width(probe: Any) -> tuple[int, ...]:
    if isinstance(probe, FEATURES):
        return (12,)
    return (2,) if probe.stacked else ()
