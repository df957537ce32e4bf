"""FastVLM: a mostly convolutional encoder, whose features are projected one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.core.spans import Crop, Span
from foveate.families.base import Process, Size
from foveate.families.batches import joined_outputs
from foveate.families.layout import WHOLE, Grid, Layout, crop_layout
from foveate.families.merged import MergedFamily


class FastVlm(MergedFamily):
    """FastVLM. Its encoder is mostly convolutional; the attention that its last stages have is not read."""

    name = "fast_vlm"
    model_types = ("fast_vlm",)
    inputs: ClassVar = {"pixel_values": "image"}
    has_attention = False
    resizes = True
    notes = "one grid per image; no attention to read: methods that need it are refused"

    def imagined_images(
        self, model: Any, size: Size, images: int, process: Process
    ) -> tuple[list[Layout], dict[str, Any]]:
        inputs = process(images)
        features = self.run_encoder(model, inputs["pixel_values"].to("meta", model.dtype)).last_hidden_state
        grid = (features.shape[-2], features.shape[-1])
        return [crop_layout(grid, i, [WHOLE]) for i in range(images)], inputs

    def layouts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[Layout]:
        images, _, height, width = inputs["pixel_values"].shape
        # By how much the encoder scales a picture down is not in timm's configuration; the prompt tells.
        placeholders = int((inputs["input_ids"] == self.token_id(model, kind)).sum())
        size = placeholders // images
        rows = max(1, round((size * height / width) ** 0.5))
        if placeholders % images or size % rows:
            raise InputError(
                f"the prompts hold {placeholders} image placeholder tokens, which cannot be the grids of {images} "
                f"images of {height} x {width} pixels: let the model's processor expand one image token per image"
            )
        grid = (rows, size // rows)
        return [Layout(size, (1, *grid), (Crop(torch.arange(size), grid, encoder_row=i),)) for i in range(images)]

    def to_tokens(self, model: Any, inputs: Mapping[str, Any], kind: str, values: Tensor) -> Tensor:
        raise NotImplementedError("there is no attention to read")

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        pixels, results = inputs["pixel_values"], []
        for span, ((h, w),) in zip(spans, grids, strict=True):
            (rows, columns), crop = span.grid[1:], span.crops[0]
            size = (pixels.shape[-2] // rows * h, pixels.shape[-1] // columns * w)
            picture = pixels[crop.encoder_row][None].float()
            small = nn.functional.interpolate(picture, size=size, mode="bicubic", antialias=True).to(pixels.dtype)
            results.append([self.image_features(model, {"pixel_values": small}, "image").pooler_output[0]])
        return results

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return joined_outputs(spans, embeds)
