"""Ranking and similarity helpers that methods share: float32, stable, ties to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def descending(scores: Tensor) -> Tensor:
    """Return the indices that sort scores ``[B, N]`` from high to low, ties in index order, NaN last."""
    return scores.float().nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True)


def top(scores: Tensor, count: int) -> Tensor:
    """Return the indices ``[B, count]`` of the highest scores ``[B, N]``, ascending."""
    return descending(scores)[:, :count].sort(dim=-1).values


def cosine_matrix(features: Tensor) -> Tensor:
    """Return all cosine similarities ``[B, N, N]`` of features ``[B, N, C]`` in float32; zero vectors give zero."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return torch.bmm(unit, unit.transpose(1, 2))
