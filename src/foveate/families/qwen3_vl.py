"""Qwen3-VL: features of several encoder layers reach the LLM (DeepStack), and videos have text between their frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.families.layout import Layout
from foveate.families.mrope import MRopeFamily


class Qwen3Vl(MRopeFamily):
    """Qwen3-VL and its mixture of experts.

    The planes that DeepStack adds to the first LLM layers lie beside the embeddings, ``[N, 1 + planes, D]``, so that
    they are gathered and merged with them. The timestamps between the frames of a video are text, and stay.
    """

    name = "qwen3_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cohere_compass")
    notes = "as qwen2_vl; DeepStack planes are pruned along; timestamps between frames stay"

    def layers_written(self, model: Any) -> int:
        return len(model.config.vision_config.deepstack_visual_indexes)

    def rows(self, model: Any, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        planes = (output.pooler_output, *output.deepstack_features)
        flat = torch.stack([torch.cat(list(plane)) for plane in planes], dim=1)
        return list(torch.split(flat, [layout.length for layout in layouts]))

    def embeddings(self, rows: Tensor) -> Tensor:
        return rows[:, 0]

    def output(self, embeds: Sequence[Tensor]) -> Any:
        # Imported where it is needed: it brings the whole model along.
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures as Output

        embeddings, *planes = zip(*(x.unbind(dim=1) for x in embeds), strict=True)
        return Output(pooler_output=list(embeddings), deepstack_features=[list(plane) for plane in planes])
