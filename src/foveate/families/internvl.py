"""InternVL 2.5, 3 and 3.5: InternViT with ``[CLS]``, squares of patches merged by pixel shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from foveate.families.tiled import TiledFamily, vision_layer


class InternVL(TiledFamily):
    """InternVL. Tiles, then the overview, are one run of placeholders; each frame of a video is a picture."""

    name = "internvl"
    model_types = ("internvl",)
    has_cls = True
    frames_are_images = True
    notes = "tiles, overview and frames are crops; pruned behind pixel shuffle and projector"

    def lead(self, model: Any) -> int:
        return 1

    def block(self, model: Any) -> int:
        return int(1 / model.config.downsample_ratio)

    def same_picture(self, gap: Sequence[int], end: int | None) -> bool:
        return not gap

    def read_layer(self, model: Any) -> int:
        return vision_layer(model)

    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        # As the model does: -1 stands for the normed output, any other number for a hidden state.
        layer = model.config.vision_feature_layer
        output = model.model.vision_tower(pixels, output_hidden_states=layer != -1)
        features = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return features[:, 1:]  # type: ignore[no-any-return]

    def merge(self, model: Any, blocks: Tensor) -> Tensor:
        side = self.block(model)
        shuffled = model.model.pixel_shuffle(blocks.reshape(len(blocks), side, side, -1), model.config.downsample_ratio)
        return model.model.multi_modal_projector(shuffled)  # type: ignore[no-any-return]
