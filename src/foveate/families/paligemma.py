"""PaliGemma: a SigLIP tower, one crop per image; image and prompt attend to each other in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor, nn

from foveate.core.spans import Span
from foveate.families.batches import joined_outputs
from foveate.families.llava import Llava


class PaliGemma(Llava):
    """PaliGemma 1 and 2.

    The prefix (images and prompt, ``token_type_ids`` 0) attends in both directions: the plane is compacted with the
    rest, so the kept tokens do, too.
    """

    name = "paligemma"
    model_types = ("paligemma",)
    takes_compressor = False
    has_cls = False
    two_way = True
    # Up to transformers 5.23, the blocks that attend in both directions reach across packed prompts.
    packs = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    answer_type = 1
    notes = "one grid per image; pruned between the vision tower and the projector; prefix attention stays"

    def projects_cls(self, model: Any, inputs: Mapping[str, Any]) -> bool:
        return False

    # The projector reads the tower's last_hidden_state: the last layer, normed.
    def feature_layers(self, model: Any, inputs: Mapping[str, Any]) -> list[int]:
        return [-1]

    def final(self, model: Any) -> nn.Module | None:
        modules = model.model.vision_tower.named_modules()
        norm: nn.Module = next(module for name, module in modules if name.endswith("post_layernorm"))
        return norm

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return joined_outputs(spans, embeds)
