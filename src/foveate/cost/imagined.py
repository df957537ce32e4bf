"""Visual tokens that nobody has seen: the images that a user describes by number and size, and random values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.probes import (
    Attention,
    ClsSimilarity,
    ClsToken,
    Embeddings,
    Features,
    Heads,
    LayerProbe,
    Probe,
    Query,
)
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.cost.anatomy import Anatomy, Tower
from foveate.cost.work import Work, work_of
from foveate.families.base import Grid
from foveate.families.fast_vlm import FastVlm
from foveate.families.gemma3 import Gemma3
from foveate.families.generic import Generic
from foveate.families.internvl import InternVL
from foveate.families.llava import Llava, feature_layers, strategy
from foveate.families.llava_next import LlavaNext, mosaic, tiles_of
from foveate.families.llava_onevision import LlavaOnevision
from foveate.families.merged import Layout
from foveate.families.mrope import MRopeFamily
from foveate.families.perception_lm import PerceptionLM
from foveate.families.raster import RasterFamily
from foveate.families.smolvlm import SmolVLM
from foveate.families.tiled import crop_layout, tile_boxes
from foveate.families.video_llava import VideoLlava

Size = tuple[int, int]


def imagine(
    anatomy: Anatomy, size: Size, images: int, frames: int, visual_tokens: int | None = None, processor: Any = None
) -> Work:
    """Lay out the images and the video of a prompt.

    Parameters
    ----------
    size
        Width and height in pixels; of no effect in models that scale every picture to the same size.
    images
        How many images.
    frames
        Frames of a video beside them; 0 for none. Each is encoded as an image of that size would be, where pictures can
        have any size.
    visual_tokens
        How many visual tokens all of them make, instead of what the sizes come to: without separators, in equal
        parts.
    processor
        The model's image processor, for models that cut or scale pictures by their size.

    Raises
    ------
    InputError
        If the counts do not go together, or the model needs a processor and there is none, or one that refuses the
        size.
    """
    _check(anatomy, size, images, frames, visual_tokens)
    if visual_tokens is not None:
        return _counted(anatomy, images, frames, visual_tokens)
    inputs: dict[str, Any] = {}
    layouts = [(layout, "image") for layout in _stills(anatomy, size, images, processor, inputs)] if images else []
    if frames:
        layouts += [(layout, kind) for layout, kind in _video(anatomy, size, frames, processor, inputs)]
    spans, start = [], 0
    for ordinal, (layout, kind) in enumerate(layouts):
        columns = torch.arange(start, start + layout.length)
        spans.append(Span(kind, 0, ordinal, columns, layout.grid, layout.crops, layout.extents))
        start += layout.length
    return work_of(anatomy, inputs, spans)


def _check(anatomy: Anatomy, size: Size, images: int, frames: int, visual_tokens: int | None) -> None:
    if min(size) < 1 or images < 0 or frames < 0 or images + frames == 0:
        raise InputError(f"at least one image or frame, of at least 1 x 1 pixels: not {images}, {frames} and {size}")
    if isinstance(anatomy.family, Generic):
        raise UnsupportedModelError(
            f"{type(anatomy.model).__name__} belongs to no family of its own: what an image comes to is known from its "
            "processor's output alone; `foveate run` counts it"
        )
    takes_videos = "video" in anatomy.family.kinds or isinstance(anatomy.family, InternVL | SmolVLM)
    if frames and not takes_videos:
        raise InputError(f"models of the family {anatomy.family.name!r} take no videos: use images instead of frames")
    if visual_tokens is not None and (visual_tokens < 1 or visual_tokens % (images + bool(frames))):
        raise InputError(
            f"{visual_tokens} visual tokens cannot be divided into equal parts among {images + bool(frames)} image(s) "
            "and videos"
        )
    if visual_tokens is not None and anatomy.tower is None:
        raise InputError(f"the encoder of {anatomy.family.name} counts pixels: give image sizes, not visual tokens")


def _counted(anatomy: Anatomy, images: int, frames: int, visual_tokens: int) -> Work:
    """Lay out a number of visual tokens as whole pictures, or as pictures of any size."""
    part, block = visual_tokens // (images + bool(frames)), math.isqrt(anatomy.merges)
    fixed = _tower(anatomy).grid
    tile = None if fixed is None else _tokens_of(anatomy, fixed)
    spans: list[Span] = []
    pictures: list[Grid] = []
    for number in range(images + bool(frames)):
        video = number >= images
        steps = _steps(anatomy, frames) if video else 1
        if tile is None:
            sizes, grids = _shares(part, steps), [_nearest_grid(n) for n in _shares(part, steps)]
            pictures += [(h * block, w * block) for h, w in grids]
        else:
            whole = math.prod(tile)
            sizes = _shares(part, steps) if video else [whole] * (part // whole) + [part % whole] * bool(part % whole)
            grids = [tile if n == whole else _nearest_grid(n) for n in sizes]
            pictures += [fixed] * len(sizes)  # type: ignore[list-item]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        crops = tuple(
            Crop(torch.arange(start, start + n), grid, encoder_row=i)
            for i, (start, n, grid) in enumerate(zip(starts, sizes, grids, strict=True))
        )
        kind = "video" if video and "video" in anatomy.family.kinds else "image"
        columns = torch.arange(part) + number * part
        spans.append(Span(kind, 0, number, columns, (len(crops), *grids[0]), crops))
    return Work(tuple(pictures), tuple(spans))


def _shares(total: int, parts: int) -> list[int]:
    if total < parts:
        raise InputError(f"{total} visual tokens are fewer than the {parts} frames or temporal steps of the video")
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]


def _nearest_grid(n: int) -> Grid:
    rows = next(h for h in range(math.isqrt(n), 0, -1) if n % h == 0)
    return rows, n // rows


def _steps(anatomy: Anatomy, frames: int) -> int:
    if isinstance(anatomy.family, MRopeFamily):
        return -(-frames // int(anatomy.model.config.vision_config.temporal_patch_size))
    return frames


def _tokens_of(anatomy: Anatomy, patches: Grid) -> Grid:
    """Return the rows and columns of tokens that a picture's patches make."""
    block = math.isqrt(anatomy.merges)
    if isinstance(anatomy.family, PerceptionLM):
        block = int(anatomy.model.config.projector_pooling_ratio)
    return patches[0] // block, patches[1] // block


def _pixels(anatomy: Anatomy, *shape: int) -> Tensor:
    """Make pixels without values for pictures of the one size that the tower takes."""
    height, width = (n * side for n, side in zip(_grid(anatomy), _tower(anatomy).patch, strict=True))
    return torch.empty(*shape, 3, height, width, device="meta")


def _tower(anatomy: Anatomy) -> Tower:
    assert anatomy.tower is not None
    return anatomy.tower


def _grid(anatomy: Anatomy) -> Grid:
    """Return the rows and columns of patches of a family whose pictures all have the same."""
    grid = _tower(anatomy).grid
    assert grid is not None
    return grid


def _stills(anatomy: Anatomy, size: Size, images: int, processor: Any, inputs: dict[str, Any]) -> list[Layout]:
    family, model = anatomy.family, anatomy.model
    sizes = torch.tensor([[size[1], size[0]]] * images)
    if isinstance(family, LlavaOnevision | LlavaNext):
        side = _grid(anatomy)[0]
        if isinstance(family, LlavaNext):
            tiles = tiles_of(model, sizes[0].tolist())
            inputs["pixel_values"] = _pixels(anatomy, images, 1 + math.prod(tiles))
            parts = [mosaic(side, tiles, sizes[0].tolist(), i * (1 + math.prod(tiles))) for i in range(images)]
            return [Layout(length, (len(crops), side, side), crops, extents) for length, crops, extents in parts]
        tiles = tiles_of(model, sizes[0].tolist()) if images == 1 else (0, 0)  # several images are not tiled
        inputs["pixel_values"] = _pixels(anatomy, images, 1 + math.prod(tiles))
        return family.layouts(model, {"image_sizes": sizes, "batch_num_images": torch.tensor([images])}, "image")
    if isinstance(family, Llava | VideoLlava):
        inputs["pixel_values"] = _pixels(anatomy, images)
        grid = _grid(anatomy)
        cls = family.projects_cls(model, {}) if isinstance(family, Llava) else strategy(model, {}) == "full"
        return [_frames(grid, 1, int(cls)) for _ in range(images)]
    if isinstance(family, Gemma3):
        inputs["pixel_values"] = _pixels(anatomy, images)
        return family.layouts(model, inputs, "image")
    inputs.update(_processed(anatomy, size, images, processor))
    if isinstance(family, MRopeFamily | RasterFamily):
        return family.layouts(model, inputs, "image")
    if isinstance(family, FastVlm):
        features = model.model.vision_tower(inputs["pixel_values"].to("meta", model.dtype)).last_hidden_state
        grid = (features.shape[-2], features.shape[-1])
        return [crop_layout(grid, i, tile_boxes(1, "last", None)) for i in range(images)]
    shape, patch = inputs["pixel_values"].shape, _tower(anatomy).patch
    grid = _tokens_of(anatomy, (shape[-2] // patch[0], shape[-1] // patch[1]))
    tiles_each = math.prod(shape[:-3]) // images
    return [crop_layout(grid, i * tiles_each, tile_boxes(tiles_each, "last", None)) for i in range(images)]


def _processed(anatomy: Anatomy, size: Size, images: int, processor: Any) -> dict[str, Any]:
    """Run the image processor on blank pictures."""
    if processor is None:
        raise InputError(
            f"what an image comes to in the family {anatomy.family.name!r} depends on its processor, and there is no "
            "preprocessor_config.json: say how many visual tokens there are (--visual-tokens)"
        )
    try:
        blank = Image.new("RGB", size)
        return dict(processor(images=[[blank]] * images, return_tensors="pt"))
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:
        raise InputError(
            f"{type(processor).__name__} does not take pictures of {size[0]} x {size[1]} pixels: {error}; use another "
            "--image-size"
        ) from error


def _frames(grid: Grid, frames: int, lead: int) -> Layout:
    """Lay out frames of a grid, each with some tokens before it that belong to no crop."""
    size = lead + math.prod(grid)
    crops = tuple(Crop(torch.arange(f * size + lead, (f + 1) * size), grid, encoder_row=f) for f in range(frames))
    extents = tuple((f * size + lead, (f + 1) * size) for f in range(frames) if lead)
    return Layout(frames * size, (frames, *grid), crops, extents)


def _video(
    anatomy: Anatomy, size: Size, frames: int, processor: Any, inputs: dict[str, Any]
) -> list[tuple[Layout, str]]:
    family, model = anatomy.family, anatomy.model
    if isinstance(family, MRopeFamily):
        _, height, width = _processed(anatomy, size, 1, processor)["image_grid_thw"][0].tolist()
        inputs["pixel_values_videos"] = torch.empty(0)
        inputs["video_grid_thw"] = torch.tensor([[_steps(anatomy, frames), height, width]])
        return [(family.layouts(model, inputs, "video")[0], "video")]
    grid = _grid(anatomy)
    if "video" not in family.kinds:  # each frame is a picture of its own, of a single crop
        shape = tuple(inputs["pixel_values"].shape[:-3]) if "pixel_values" in inputs else (0,)
        inputs["pixel_values"] = _pixels(anatomy, math.prod(shape) + frames)
        return [(crop_layout(_tokens_of(anatomy, grid), 0, tile_boxes(1, "last", None)), "image")] * frames
    inputs["pixel_values_videos"] = _pixels(anatomy, 1, frames)
    if isinstance(family, LlavaOnevision):
        return [(family.layouts(model, inputs, "video")[0], "video")]
    if isinstance(family, LlavaNext):
        stride = int(model.config.spatial_pool_stride)
        return [(_frames((grid[0] // stride, grid[1] // stride), frames, 0), "video")]
    if isinstance(family, VideoLlava):
        return [(_frames(grid, frames, 1), "video")]
    return [(_frames(_tokens_of(anatomy, grid), frames, 0), "video")]


def imagined_tokens(
    anatomy: Anatomy, spans: Sequence[Span], probes: Sequence[Probe], text_tokens: int, seed: int = 0
) -> VisualTokens:
    """Fill tokens with random values, as wide as the model's."""
    generator = torch.Generator().manual_seed(seed)
    embedding = anatomy.model.get_input_embeddings().weight.shape[1]
    features = embedding
    if anatomy.projects_kept and anatomy.tower is not None:
        features = anatomy.tower.layers[0].width * len(_read(anatomy))
    planes: dict[Probe, list[Tensor]] = {}
    crops = [crop for span in spans for crop in span.crops]
    for probe in dict.fromkeys((Features(), *probes)):
        if isinstance(probe, Features | Embeddings):
            width = features if isinstance(probe, Features) else embedding
            planes[probe] = [torch.randn(len(c), width, generator=generator) for c in crops]
        elif isinstance(probe, ClsSimilarity):
            planes[probe] = [torch.rand(len(c), generator=generator) for c in crops]
        elif isinstance(probe, LayerProbe):
            planes[probe] = [_layer_values(anatomy, probe, len(c), generator) for c in crops]
    query = torch.randn(max(1, text_tokens), embedding, generator=generator)
    queries = (query,) if Query() in probes else None
    return VisualTokens(tuple(spans), planes, torch.device("cpu"), cls=ClsToken() in probes, queries=queries)


def _read(anatomy: Anatomy) -> list[int]:
    family = anatomy.family
    return family.layers(anatomy.model, {}) if isinstance(family, Llava) else feature_layers(anatomy.model, {})


def _layer_values(anatomy: Anatomy, probe: LayerProbe, n: int, generator: torch.Generator) -> Tensor:
    if anatomy.tower is None:
        raise UnsupportedModelError(f"the encoder of {anatomy.family.name} has no attention to read")
    layers = anatomy.tower.layers
    count = len(probe.numbers(len(layers), anatomy.tower.read - 1, anatomy.tower.whole_layers))
    if isinstance(probe, Attention):
        values = torch.rand(n, count, generator=generator).softmax(dim=0)
    else:
        vision = anatomy.model.config.vision_config
        heads = getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", None) or 1
        shape = (count, heads, n, layers[0].width // heads)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        values = probe.read(Heads(query, key, value, shape[-1] ** -0.5)).movedim(0, -1)
    return values if probe.stacked else values[..., 0]
