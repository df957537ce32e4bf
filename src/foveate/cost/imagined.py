"""Visual tokens that nobody has seen: the images that a user describes by number and size, and random values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
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
from foveate.cost.anatomy import Anatomy
from foveate.cost.work import Work, together, work_of
from foveate.families.base import Size
from foveate.families.layout import Grid, Layout


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
    family, model, works = anatomy.family, anatomy.model, []
    process = partial(_processed, anatomy, processor, size)
    if images:
        layouts, inputs = family.imagined_images(model, size, images, process)
        works.append(work_of(anatomy, inputs, _spans(layouts, "image")))
    if frames:
        layouts, inputs = family.imagined_video(model, frames, process)
        spans = _spans(layouts, "video" if "video" in family.kinds else "image", works[0].spans if works else ())
        works.append(work_of(anatomy, inputs, spans))
    return together(works)


def _spans(layouts: Sequence[Layout], kind: str, before: Sequence[Span] = ()) -> list[Span]:
    """Put images or videos into a prompt, behind those that are there."""
    spans, start = [], sum(map(len, before))
    for ordinal, layout in enumerate(layouts, len(before)):
        columns = torch.arange(start, start + layout.length)
        spans.append(Span(kind, 0, ordinal, columns, layout.grid, layout.crops, layout.extents))
        start += layout.length
    return spans


def _check(anatomy: Anatomy, size: Size, images: int, frames: int, visual_tokens: int | None) -> None:
    if min(size) < 1 or images < 0 or frames < 0 or images + frames == 0:
        raise InputError(f"at least one image or frame, of at least 1 x 1 pixels: not {images}, {frames} and {size}")
    if anatomy.family.opaque:
        raise UnsupportedModelError(
            f"{type(anatomy.model).__name__} belongs to no family of its own: what an image comes to is known from its "
            "processor's output alone; `foveate run` counts it"
        )
    if frames and not anatomy.family.takes_videos:
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
    fixed = anatomy.family.picture_grid(anatomy.model)
    tile = None if fixed is None else anatomy.family.tokens_of(anatomy.model, fixed)
    spans: list[Span] = []
    pictures: list[Grid] = []
    for number in range(images + bool(frames)):
        video = number >= images
        steps = anatomy.family.steps(anatomy.model, frames) if video else 1
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


def _processed(anatomy: Anatomy, processor: Any, size: Size, images: int) -> dict[str, Any]:
    """Run the image processor on blank pictures."""
    if processor is None:
        raise InputError(
            f"what an image comes to in the family {anatomy.family.name!r} depends on its processor, and there is no "
            "preprocessor_config.json: say how many visual tokens there are (--visual-tokens)"
        )
    try:
        blank = Image.new("RGB", size)
        return dict(processor(images=[[blank]] * images, return_tensors="pt"))
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:  # each refuses in its way
        raise InputError(
            f"{type(processor).__name__} does not take pictures of {size[0]} x {size[1]} pixels: {error}; use another "
            "--image-size"
        ) from error


def imagined_tokens(
    anatomy: Anatomy, spans: Sequence[Span], probes: Sequence[Probe], text_tokens: int, seed: int = 0
) -> VisualTokens:
    """Fill tokens with random values, as wide as the model's."""
    generator = torch.Generator().manual_seed(seed)
    embedding = anatomy.model.get_input_embeddings().weight.shape[1]
    features = embedding
    if anatomy.family.projects_kept and anatomy.tower is not None:
        features = anatomy.tower.layers[0].width * anatomy.family.features_read(anatomy.model)
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


def _layer_values(anatomy: Anatomy, probe: LayerProbe, n: int, generator: torch.Generator) -> Tensor:
    if anatomy.tower is None:
        raise UnsupportedModelError(f"the encoder of {anatomy.family.name} has no attention to read")
    layers = anatomy.tower.layers
    count = len(probe.numbers(len(layers), anatomy.tower.read - 1, anatomy.tower.whole_layers))
    if isinstance(probe, Attention):
        values = torch.rand(n, count, generator=generator).softmax(dim=0)
    else:
        vision = anatomy.model.config.vision_config
        # Qwen's encoders call their heads num_heads, timm's configuration does not name them.
        heads = getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", None) or 1
        shape = (count, heads, n, layers[0].width // heads)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        values = probe.read(Heads(query, key, value, shape[-1] ** -0.5)).movedim(0, -1)
    return values if probe.stacked else values[..., 0]
