"""LLaVA-OneVision: SigLIP at any resolution, the mosaic of tiles scaled down if it is large, and pooled videos."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.errors import UnsupportedModelError
from foveate.core.spans import Crop, Span
from foveate.families.base import Process, Size
from foveate.families.batches import joined_outputs
from foveate.families.layout import Grid, Layout
from foveate.families.llava import feature_layers
from foveate.families.merged import MergedFamily
from foveate.families.mosaic import side_of, tiles_of, without_fillers
from foveate.families.scaled_mosaic import Picture, pictures_of
from foveate.families.tiled import vision_layer
from foveate.families.tower import resized_crops


class LlavaOnevision(MergedFamily):
    """LLaVA-OneVision. Overview, tiles and frames are crops; newlines after rows and after a video are separators.

    A token of a mosaic that was scaled down belongs to the tile in which its middle lies.
    """

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    inputs: ClassVar = {"pixel_values": "image", "pixel_values_videos": "video"}
    side_inputs = ("image_sizes", "batch_num_images", "image_sizes_videos")
    resizes = True
    notes = "overview, tiles and frames are crops; padding is never a candidate; newline vectors follow `separators`"

    def side_inputs_of(self, kind: str) -> tuple[str, ...]:
        return ("image_sizes", "batch_num_images") if kind == "image" else ()

    def encoder(self, model: Any) -> nn.Module:
        return model.model.vision_tower  # type: ignore[no-any-return]

    def read_layer(self, model: Any) -> int:
        return vision_layer(model)

    def pooled_side(self, model: Any, kind: str) -> int:
        return 2 if kind == "video" else 1

    def imagined_images(
        self, model: Any, size: Size, images: int, process: Process
    ) -> tuple[list[Layout], dict[str, Any]]:
        width, height = size
        tiles = tiles_of(model, (height, width)) if images == 1 else (0, 0)  # several images are not tiled
        inputs = {
            "pixel_values": self.blank_pictures(model, images, 1 + math.prod(tiles)),
            "image_sizes": torch.tensor([[height, width]] * images),
            "batch_num_images": torch.tensor([images]),
        }
        return self.layouts(model, inputs, "image"), inputs

    def imagined_video(self, model: Any, frames: int, process: Process) -> tuple[list[Layout], dict[str, Any]]:
        inputs = {"pixel_values_videos": self.blank_pictures(model, 1, frames)}
        return self.layouts(model, inputs, "video"), inputs

    def layouts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[Layout]:
        if model.config.vision_feature_select_strategy != "full":
            raise UnsupportedModelError("LLaVA-OneVision is supported with vision_feature_select_strategy='full'")
        if kind == "image":
            return [picture.layout for picture in pictures_of(model, inputs)]
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        side = math.ceil(side_of(model) / 2)
        size = side * side
        starts = [f * size for f in range(frames + 1)]
        crops = [Crop(torch.arange(start, start + size), (side, side)) for start in starts[:-1]]
        return [
            Layout(
                starts[-1] + 1,
                (frames, side, side),
                tuple(replace(crop, encoder_row=i * frames + f) for f, crop in enumerate(crops)),
                ((0, starts[-1]),),
            )
            for i in range(videos)
        ]

    def to_tokens(self, model: Any, inputs: Mapping[str, Any], kind: str, values: Tensor) -> Tensor:
        side = side_of(model)
        maps = values.float().reshape(len(values), side, side, -1).movedim(-1, 1)  # [R, channels, side, side]
        if kind == "video":
            half = math.ceil(side / 2)
            tokens = _scaled(maps, (half, half)).flatten(2).transpose(1, 2).flatten(0, 1)
        else:
            tokens = torch.cat(list(_image_tokens(pictures_of(model, inputs), maps)))
        return tokens.reshape(len(tokens), *values.shape[2:])

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        pixels: dict[str, Tensor] = {}
        plain: dict[int, Crop] = {}
        if inputs.get("pixel_values") is not None:
            pictures = pictures_of(model, inputs)
            given = inputs["pixel_values"]
            pixels["image"] = given if given.dim() == 4 else without_fillers(given, [p.tiles for p in pictures])
            plain = {crop.encoder_row: crop for picture in pictures for crop in picture.plain}
        if inputs.get("pixel_values_videos") is not None:
            pixels["video"] = inputs["pixel_values_videos"].flatten(0, 1)
        patch, results = model.config.vision_config.patch_size, []
        for span, sizes in zip(spans, grids, strict=True):
            video = span.kind == "video"
            crops = span.crops if video else [plain[crop.encoder_row] for crop in span.crops]
            features = resized_crops(
                model.model.vision_tower, pixels[span.kind], crops, sizes, patch * (1 + video),
                feature_layers(model, inputs), has_cls=False,
            )  # fmt: skip
            embeds = [model.model.multi_modal_projector(x) for x in features]
            results.append([_halved(x, grid) if video else x for x, grid in zip(embeds, sizes, strict=True)])
        return results

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        outputs = joined_outputs(spans, embeds)
        images = [x for x, span in zip(embeds, spans, strict=True) if span.kind == "image"]
        return {**outputs, **({"image": BaseModelOutputWithPooling(pooler_output=images)} if images else {})}


def _scaled(maps: Tensor, shape: Grid) -> Tensor:
    """Scale maps ``[R, channels, h, w]`` as the models scale features."""
    if maps.shape[-2:] == shape:
        return maps
    return nn.functional.interpolate(maps, size=list(shape), mode="bilinear")


def _halved(tokens: Tensor, grid: Grid) -> Tensor:
    """Pool the tokens of a frame, two rows and columns for each of the grid, as the model does."""
    maps = tokens.T.reshape(1, -1, 2 * grid[0], 2 * grid[1])
    return _scaled(maps, grid)[0].flatten(1).T


def _image_tokens(pictures: Sequence[Picture], maps: Tensor) -> Iterator[Tensor]:
    """Yield the values ``[n, channels]`` of the tokens of each crop, from those of patches of all tiles."""
    row = 0
    for picture in pictures:
        height, width = picture.tiles
        yield maps[row].flatten(1).T
        row += 1
        if not height * width:
            continue
        whole = maps[row : row + height * width].reshape(height, width, *maps.shape[1:])
        whole = whole.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)  # [channels, rows, columns]
        shown = whole[:, slice(*picture.rows), slice(*picture.columns)]
        tokens = _scaled(shown[None], picture.shape)[0].flatten(1).T
        start, stride = maps.shape[-1] ** 2, picture.shape[1] + 1
        for crop in picture.layout.crops[1:]:
            place = crop.index.to(tokens.device) - start
            yield tokens[place // stride * picture.shape[1] + place % stride]
        row += height * width
