"""Aya Vision: SigLIP tiles merged by pixel shuffle, each behind a text marker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.offload import tables, weights_at_hand
from foveate.families.tiled import TiledFamily, vision_layer


class AyaVision(TiledFamily):
    """Aya Vision. A marker with its number stands before each tile, another before the overview, which comes last."""

    name = "aya_vision"
    model_types = ("aya_vision",)

    def block(self, model: Any) -> int:
        return int(model.config.downsample_factor)

    def same_picture(self, gap: Sequence[int], end: int | None) -> bool:
        # The token that ends a picture follows its overview; a marker follows every other tile.
        return gap[:1] != [end]

    def read_layer(self, model: Any) -> int:
        return vision_layer(model)

    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        layer, cut = model.config.vision_feature_layer, model.config.vision_feature_select_strategy == "default"
        tower = model.model.vision_tower
        with weights_at_hand(tables(tower)):
            output = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        layers = [layer] if isinstance(layer, int) else layer
        return torch.cat([output.hidden_states[i][:, int(cut) :] for i in layers], dim=-1)
