"""Ranking and similarity helpers that methods share: float32, stable, ties to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor

# Of b blocks a triangle has (b + 1) / 2b of the products; small blocks multiply slower.
_BLOCKS, _SMALLEST_BLOCK = 5, 64


def descending(scores: Tensor) -> Tensor:
    """Return the indices that sort scores ``[B, N]`` from high to low, ties in index order, NaN last."""
    return scores.float().nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True)


def top(scores: Tensor, count: int) -> Tensor:
    """Return the indices ``[B, count]`` of the highest scores ``[B, N]``, ascending."""
    return descending(scores)[:, :count].sort(dim=-1).values


def cosine_matrix(features: Tensor) -> Tensor:
    """Return all cosine similarities ``[B, N, N]`` of features ``[B, N, C]`` in float32; zero vectors give zero.

    Products are computed for one triangle of blocks, and mirrored.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    size = unit.shape[1]
    block = max(-(-size // _BLOCKS), _SMALLEST_BLOCK)
    out = unit.new_empty(unit.shape[0], size, size)
    for start in range(0, size, block):
        end = min(start + block, size)
        products = torch.bmm(unit[:, start:end], unit[:, start:].transpose(1, 2))
        out[:, start:end, start:] = products
        out[:, end:, start:end] = products[:, :, end - start :].transpose(1, 2)
    return out
