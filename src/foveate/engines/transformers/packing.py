"""Packed rows: several prompts in one row, told apart by positions that restart, without a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from foveate.core.errors import UnsupportedModelError
from foveate.engines.transformers.compaction import Compaction


def packed_prompts(inputs: Mapping[str, Any], axes: bool) -> Tensor | None:
    """Return the number ``[B, L]`` of the packed prompt of each token, or `None` if each row is one prompt.

    `axes` says that positions run along several axes: transformers then reads packing from a row before them alone.
    """
    positions, ids = inputs.get("position_ids"), inputs.get("input_ids")
    if positions is None or ids is None or inputs.get("attention_mask") is not None:
        return None
    if positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]
    elif axes or positions.dim() != 2:
        return None
    if positions.shape[-1] != ids.shape[1]:
        return None
    numbers = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1).expand(ids.shape)
    return numbers if bool(numbers.any()) else None


def renumbered(numbers: Tensor, compaction: Compaction) -> Tensor:
    """Count the compact columns ``[B, W]`` from 0 on in each packed prompt; padding is a prompt of its own."""
    padded = compaction.apply(numbers, fill=-1)
    places = torch.arange(padded.shape[1], device=padded.device).expand_as(padded)
    starts = torch.diff(padded, prepend=padded[:, :1] - 1) != 0
    return places - torch.where(starts, places, 0).cummax(dim=1).values


def keep_apart(out: dict[str, Any], model: Any, text: Tensor, positions: str, axes: bool) -> None:
    """Let compact inputs keep their packed prompts apart, whose tokens are counted in `text` ``[B, W]``."""
    out.pop("attention_mask", None)
    if axes:
        out["position_ids"] = torch.cat([text[None], out["position_ids"][-3:]])
    elif positions == "compact":
        out["position_ids"] = text
    elif "flash" in str(model.config.get_text_config()._attn_implementation):
        raise UnsupportedModelError(
            "flash attention reads the borders of packed prompts from positions, which have gaps now: use "
            "positions='compact'"
        )
    elif "create_masks_for_generate" in vars(type(model)):
        raise UnsupportedModelError(
            f"{type(model).__name__} lets images see both ways, by a mask of its own that knows no packed prompts with "
            "gaps: use positions='compact'"
        )
    else:
        # Gaps between positions look like borders: the mask says where these are.
        like = model.get_input_embeddings().weight.new_empty(*text.shape, 1)
        out["attention_mask"] = create_masks_for_generate(model.config, like, None, None, position_ids=text)
