"""Attention masks of layers that hold fewer columns than the first one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def select_mask(
    mask: Any, columns: Tensor, index: Tensor, past: int, length: int, padded: bool, implementation: str
) -> Any:
    """Return the mask of a layer that holds some columns, from that of a layer of the kind that holds all of them.

    Parameters
    ----------
    mask
        ``[B or 1, 1, q, K]``: true, or zero, where a key is seen, K being the last columns; or ``[B, K]``, zero at
        padding; or `None`, with causality alone.
    columns
        ``[B, W]`` int64: the columns that the layer holds, those of the pass at the end; -1 at padding.
    index
        ``[B, R]`` int64: the columns of the pass that the layer holds; -1 at padding.
    past, length
        Columns of the first layer, without and with those of the pass.
    padded
        Whether anything is -1.
    implementation
        Name of the attention implementation.
    """
    if mask is None:
        return _causal(columns, index, past, implementation) if padded else None
    columns, index = columns.to(mask.device), index.to(mask.device)
    if mask.dim() == 2:
        place = columns - (length - mask.shape[1])
        return mask.gather(1, place.clamp(min=0)) * (place >= 0)
    place = columns - (length - mask.shape[-1])
    batch = torch.arange(len(columns), device=mask.device)[:, None, None]
    picked = mask[:, 0].expand(len(columns), -1, -1)[batch, index.clamp(min=0)[:, :, None], place.clamp(min=0)[:, None]]
    hidden = ((columns < 0) | (place < 0))[:, None]
    if padded:
        hidden = hidden & (index >= 0)[:, :, None]  # rows of padding see something, lest they come to NaN
    if picked.dtype == torch.bool:
        return (picked & ~hidden)[:, None]
    return picked.masked_fill(hidden, torch.finfo(picked.dtype).min)[:, None]


def _causal(columns: Tensor, index: Tensor, past: int, implementation: str) -> Tensor:
    if "flash" in implementation:
        return (columns >= 0).long()
    padding = (index < 0)[:, :, None]
    visible = (columns >= 0)[:, None] & (columns[:, None] <= (index + past)[:, :, None])
    return (visible | padding)[:, None]
