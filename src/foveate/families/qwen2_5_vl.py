"""Qwen2.5-VL: attention within windows in most layers, for which the encoder reorders the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.families.mrope import MRopeFamily


class Qwen2_5Vl(MRopeFamily):  # noqa: N801  the model's own name
    """Qwen2.5-VL: what probes read in the encoder is in the order of windows, and is put back in raster order."""

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    side_inputs = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    notes = "as qwen2_vl; probes are put back from window order"

    def whole_layers(self, model: Any) -> Sequence[int]:
        return sorted(model.config.vision_config.fullatt_block_indexes)

    def window(self, model: Any) -> int:
        vision = model.config.vision_config
        return int(vision.window_size // vision.patch_size)

    def to_tokens(self, model: Any, inputs: Mapping[str, Any], kind: str, values: Tensor) -> Tensor:
        tokens = super().to_tokens(model, inputs, kind, values)
        vision = model.config.vision_config
        window = vision.window_size // vision.spatial_merge_size // vision.patch_size  # in tokens
        grids = [c.grid for layout in self.layouts(model, inputs, kind) for c in layout.crops if c.grid is not None]
        order, start = [], 0
        for grid in grids:
            order.append(start + window_order(grid, window))
            start += len(order[-1])
        return torch.empty_like(tokens).index_copy(0, torch.cat(order).to(tokens.device), tokens)


def window_order(grid: tuple[int, int], window: int) -> Tensor:
    """Return the raster indices ``[h * w]`` of a grid in the order of its windows, row by row within each."""
    rows, columns = (torch.arange(n) // window for n in grid)
    return (rows[:, None] * (len(columns) + 1) + columns).flatten().argsort(stable=True)
