"""Pixtral's tower, which packs pictures of any size: Mistral 3, and LLaVA checkpoints that have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core.errors import BudgetError, InputError, UnsupportedModelError
from foveate.core.spans import Span
from foveate.families.layout import Grid
from foveate.families.llava import feature_layers, strategy
from foveate.families.raster import RasterFamily
from foveate.families.tower import resized


class Mistral3(RasterFamily):
    """Mistral Small 3.1 and later: a token is made of 2 x 2 patches.

    The ``[IMG_BREAK]`` after each row and the ``[IMG_END]`` are ids of the text and stay.
    """

    name = "mistral3"
    model_types = ("mistral3",)
    side_inputs: ClassVar[tuple[str, ...]] = ("image_sizes", "vision_feature_layer")
    packs_pictures = True
    squeezes: ClassVar[bool] = True
    """Whether `get_image_features` takes the dimension of a lone token for one of size 1 to squeeze away."""
    notes = "pictures of any size, tokens of 2 x 2 patches; [IMG_BREAK] and [IMG_END] are text and stay"

    def grids(self, model: Any, inputs: Mapping[str, Any]) -> list[Grid]:
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise InputError("Pixtral's tower reads the size of each picture: pass the processor's image_sizes, too")
        patch = model.config.vision_config.patch_size
        return [(height // patch, width // patch) for height, width in torch.as_tensor(sizes).tolist()]

    def block(self, model: Any) -> int:
        return int(model.config.spatial_merge_size)

    def encode_smaller(self, model: Any, inputs: Mapping[str, Any], picture: int, grid: Grid) -> Tensor:
        if grid == (1, 1) and self.squeezes:
            raise BudgetError(
                f"the family {self.name!r} encodes no picture of a single token: keep at least 2 tokens of each image"
            )
        patch = model.config.vision_config.patch_size
        (height, width), side = self.grids(model, inputs)[picture], patch * self.block(model)
        whole = inputs["pixel_values"][picture, :, : height * patch, : width * patch]
        small = resized(whole, (grid[0] * side, grid[1] * side))
        sizes = torch.tensor([small.shape[-2:]], device=small.device)
        output = self.image_features(model, {**inputs, "pixel_values": small, "image_sizes": sizes}, "image")
        return torch.cat(list(output.pooler_output))

    def read_layer(self, model: Any) -> int:
        depth = len(self.layers(model))
        return max(i - 1 if i >= 0 else depth + i for i in feature_layers(model, {}))


class Pixtral(Mistral3):
    """Pixtral 12B and other LLaVA checkpoints with Pixtral's tower: a token per patch."""

    name = "pixtral"
    model_types = ("llava",)
    side_inputs = ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
    squeezes = False
    notes = "pictures of any size, a token per patch; [IMG_BREAK] and [IMG_END] are text and stay"

    def matches(self, config: Any) -> bool:
        return super().matches(config) and config.vision_config.model_type == "pixtral"

    def block(self, model: Any) -> int:
        return 1

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        if strategy(model, inputs) != "full":
            raise UnsupportedModelError(
                "vision_feature_select_strategy='default' drops the first token, and Pixtral's tower has no [CLS] "
                "token there: use 'full'"
            )
        return super().spans(model, inputs)
