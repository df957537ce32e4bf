"""Command A Vision: SigLIP tiles merged by pixel shuffle, each followed by a line break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from foveate.core.offload import tables, weights_at_hand
from foveate.families.tiled import TiledFamily


class Cohere2Vision(TiledFamily):
    """Command A Vision. The tiles of a picture, then its overview, each with a line-break token behind it."""

    name = "cohere2_vision"
    model_types = ("cohere2_vision",)

    def block(self, model: Any) -> int:
        return int(model.config.downsample_factor)

    def same_picture(self, gap: Sequence[int], end: int | None) -> bool:
        # Behind the last tile, the token that ends the picture follows the line break.
        return list(gap) == [end]

    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        tower = model.model.vision_tower
        with weights_at_hand(tables(tower)):
            output = tower(pixels, interpolate_pos_encoding=True)
        return output.last_hidden_state  # type: ignore[no-any-return]
