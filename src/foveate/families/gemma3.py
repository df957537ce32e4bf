"""Gemma 3: a SigLIP tower whose patches are averaged over windows; tokens of an image attend in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foveate.core.offload import tables, weights_at_hand
from foveate.core.spans import Span
from foveate.families.base import Process, Size
from foveate.families.batches import joined_outputs
from foveate.families.layout import Grid, Layout
from foveate.families.merged import mean_of_blocks
from foveate.families.raster import RasterFamily
from foveate.families.tower import resized


class Gemma3(RasterFamily):
    """Gemma 3 with images.

    A token is the average of a window of patches (4 x 4 of 64 x 64, so 256 tokens). Each crop of "pan and scan" is an
    image of its own, as in the prompt. ``token_type_ids`` say which tokens attend in both directions; the plane is
    compacted with the rest, so each image stays one block.
    """

    name = "gemma3"
    model_types = ("gemma3", "shieldgemma2")
    two_way = True
    packs = False
    notes = "tokens are averages of patches; pan-and-scan crops are images; the sliding window counts kept tokens"

    def grids(self, model: Any, inputs: Mapping[str, Any]) -> list[Grid]:
        return [(_side(model),) * 2] * len(inputs["pixel_values"])

    def picture_grid(self, model: Any) -> Grid:
        return (_side(model),) * 2

    def imagined_images(
        self, model: Any, size: Size, images: int, process: Process
    ) -> tuple[list[Layout], dict[str, Any]]:
        inputs = {"pixel_values": self.blank_pictures(model, images)}
        return self.layouts(model, inputs, "image"), inputs

    def block(self, model: Any) -> int:
        return _side(model) // int(model.config.mm_tokens_per_image**0.5)

    def encode_smaller(self, model: Any, inputs: Mapping[str, Any], picture: int, grid: Grid) -> Tensor:
        (h, w), block = grid, self.block(model)
        side = block * model.config.vision_config.patch_size
        small = resized(inputs["pixel_values"][picture], (h * side, w * side))
        tower, projector = model.model.vision_tower, model.model.multi_modal_projector
        with weights_at_hand([*tables(tower), projector]):
            patches = tower(pixel_values=small, interpolate_pos_encoding=True).last_hidden_state
            # The projector takes whole pictures only; this is what it does behind the pooling.
            tokens = projector.mm_soft_emb_norm(mean_of_blocks(patches, (h * block, w * block), block))
            return tokens[0] @ projector.mm_input_projection_weight  # type: ignore[no-any-return]

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return joined_outputs(spans, embeds)


def _side(model: Any) -> int:
    """Return how many patches an image is high and wide."""
    vision = model.config.vision_config
    return int(vision.image_size // vision.patch_size)
