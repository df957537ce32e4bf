"""Two ways to raise the logits of some keys in an attention function of `transformers`, which come to the same.

The mask takes numbers where there is one to write them into. Where there is none, because a causal kernel needs none,
keys and queries get another component, whose product is the bias: the kernel runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

FURTHER = 8
"""Components by which heads get wider: kernels want a multiple of so many."""
Call = Callable[..., Any]


def takes_mask(implementation: str, mask: Any, width: int, kwargs: Mapping[str, Any]) -> bool:
    """Return whether the bias of a call goes into its mask, and not into its keys.

    Parameters
    ----------
    width
        Number of queries.
    """
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return True
    # A single row is a small mask, while wider heads would copy the whole cache in each step. A bound on the logits
    # bends what keys and queries come to, but not what a mask adds.
    plain = "flash" not in implementation and "flex" not in implementation
    return plain and mask is None and (width == 1 or kwargs.get("softcap") is not None)


def additive(mask: Tensor | None, bias: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Return a mask ``[B, 1, q, K]`` of numbers, those of a bias ``[B, K]`` where a key is seen.

    Parameters
    ----------
    mask
        ``[B or 1, 1, q, K]``: true, or zero, where a key is seen; `None` for causality, or for nothing hidden.
    query, key
        ``[B, H, q, d]`` and ``[B, H_kv, K, d]``.
    causal
        Whether a query sees no keys behind its own place where there is no mask.
    """
    numbers, least = bias.to(query.dtype)[:, None, None], torch.finfo(query.dtype).min
    if mask is not None:
        seen = mask[..., : key.shape[2]]
        return torch.where(seen, numbers, least) if seen.dtype == torch.bool else seen + numbers
    rows, columns = query.shape[2], key.shape[2]
    if rows == 1 or not causal:
        return numbers.expand(-1, -1, rows, -1)
    place = torch.arange(columns, device=key.device)
    return torch.where(place <= place[:rows, None], numbers, least)


def augmented(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Tensor, kwargs: Mapping[str, Any]
) -> Any:
    """Call an attention function with wider heads, whose logits are raised by a bias ``[B, K]``."""
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    raised = (bias / scaling).to(key.dtype)[:, None, :, None].expand(-1, key.shape[1], -1, -1)
    ones = torch.ones_like(query[..., :1])
    width = value.shape[-1]
    wide = query.shape[-1] + FURTHER
    query = pad(torch.cat([query, ones], dim=-1), (0, FURTHER - 1))
    key = pad(torch.cat([key, raised], dim=-1), (0, FURTHER - 1))
    # Some kernels want values as wide as keys.
    out, *rest = call(query, key, pad(value, (0, wide - width)), mask, **{**kwargs, "scaling": scaling})
    return (out[..., :width], *rest)
