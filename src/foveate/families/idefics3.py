"""Idefics3: a SigLIP-like tower with a mask of patches, tiles with text markers between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.families.layout import Grid
from foveate.families.tiled import TiledFamily


class Idefics3(TiledFamily):
    """Idefics3. Markers tell the row and column of each tile; the overview comes last.

    Pictures of zeros only fill the batch up. Patches that the pixel mask hides get no attention and give none, but
    their tokens reach the LLM, and so can be kept.
    """

    name = "idefics3"
    model_types = ("idefics3",)
    side_inputs = ("pixel_attention_mask",)
    notes = "tiles and overview are crops; the markers between them stay; pruned behind pixel shuffle and projector"

    def encoder(self, model: Any) -> nn.Module | None:
        return model.model.vision_model  # type: ignore[no-any-return]

    def block(self, model: Any) -> int:
        return int(model.config.scale_factor)

    def same_picture(self, gap: Sequence[int], end: int | None) -> bool:
        # One such token stands before each tile, and a last one behind the picture.
        return list(gap).count(end or 0) == 1

    def arrangement(self, gaps: Sequence[Sequence[int]], end: int | None) -> Grid | None:
        rows = sum(gap[0] != end for gap in gaps)  # a line break ends each row
        return (rows, len(gaps) // rows) if rows and len(gaps) % rows == 0 else None

    def pictures(self, inputs: Mapping[str, Any]) -> Tensor:
        pixels: Tensor = inputs["pixel_values"].flatten(0, 1)
        mask = inputs.get("pixel_attention_mask")
        mask = torch.ones_like(pixels[:, :1]) if mask is None else mask.flatten(0, 1)[:, None].to(pixels.dtype)
        real = pixels.flatten(1).ne(0).any(dim=1)
        return torch.cat([pixels, mask], dim=1)[real]  # the mask is resized with the picture

    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        shown = nn.functional.max_pool2d(pixels[:, 3], model.config.vision_config.patch_size) > 0.5
        return model.model.vision_model(pixels[:, :3], shown).last_hidden_state  # type: ignore[no-any-return]

    def merge(self, model: Any, blocks: Tensor) -> Tensor:
        return model.model.connector(blocks)  # type: ignore[no-any-return]
