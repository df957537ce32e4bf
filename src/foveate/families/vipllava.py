"""VipLLaVA: LLaVA whose projector reads several layers of the tower side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from foveate.core.spans import Span
from foveate.families.batches import joined_outputs
from foveate.families.llava import Llava


class VipLlava(Llava):
    """VipLLaVA. Methods compare tokens by the features of all layers that the projector reads."""

    name = "vipllava"
    reduces_inside = False
    model_types = ("vipllava",)
    notes = "one grid per image; features of several layers side by side; pruned between tower and projector"

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return joined_outputs(spans, embeds)
