"""LLaVA-like models whose projector is a trained compressor: fewer placeholders, and no patches to choose among."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from foveate.core.compressor import Compressor, Installed
from foveate.core.in_llm import of_encoder
from foveate.core.reducer import Method
from foveate.core.spans import Crop, Span
from foveate.families.base import Family
from foveate.families.batches import placeholder_columns


def installed_in(model: Any) -> Installed | None:
    """Return what stands in the place of a model's projector; `None` for a stock one."""
    module = getattr(getattr(model, "model", None), "multi_modal_projector", None)
    return module.installed if isinstance(module, Compressor) else None


def compressed(family: Family, installed: Installed) -> Family:
    """Return a family as it is with a compressor: its spans are the compressor's tokens."""

    class Compressed(type(family)):  # type: ignore[misc]
        """The family with the projector's tokens in place of the encoder's patches."""

        def lacks(self, method: Method | type[Method]) -> str | None:
            for part in method.stages() if isinstance(method, Method) else [method]:
                if part.stage != "in_llm" or (isinstance(part, Method) and of_encoder(part)):
                    return (
                        f"patches of the picture to choose among, which {installed.projector.name} compresses into "
                        f"{installed.tokens} tokens before {part.name} could"
                    )
            return super().lacks(method)  # type: ignore[no-any-return]

        def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
            lengths = [installed.tokens] * len(inputs["pixel_values"])
            grid = installed.cells
            columns = placeholder_columns(inputs["input_ids"].cpu(), model.config.image_token_id, lengths, "image")
            spans: list[Span] = []
            for image, (row, found) in enumerate(columns):
                crop = Crop(torch.arange(installed.tokens), grid, encoder_row=image)
                ordinal = sum(s.sample == row for s in spans)
                spans.append(Span("image", row, ordinal, found, (1, *(grid or (1, installed.tokens))), (crop,)))
            return tuple(spans)

    return Compressed()
