"""Ranking and similarity helpers that methods share: float32, stable, ties to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor

# Of b blocks a triangle has (b + 1) / 2b of the products; small blocks multiply slower.
_BLOCKS, _SMALLEST_BLOCK = 5, 64

_ENTRIES = 2**24  # that are worked on at once: 64 MiB in float32

_GRID = 2.0**33

RESOLUTION = 1e-6
"""Cosines in float32 that differ by no more are the same, and so are sums of them that differ by no larger share."""


def descending(scores: Tensor) -> Tensor:
    """Return the indices that sort scores ``[B, N]`` from high to low, ties in index order, NaN last."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True)


def top(scores: Tensor, count: int) -> Tensor:
    """Return the indices ``[B, count]`` of the highest scores ``[B, N]``, ascending."""
    return descending(scores)[:, :count].sort(dim=-1).values


def cosine_matrix(features: Tensor, others: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return cosine similarities; zero vectors give zero.

    Of features among themselves, products are computed for one triangle of blocks, and mirrored.

    Parameters
    ----------
    features
        ``[B, N, C]``.
    others
        ``[B, M, C]``; by default the features themselves.
    dtype
        float64 is for what is compared so often that the last bits of float32, and with them the order in which a
        kernel adds, would decide.

    Returns
    -------
    Tensor
        ``[B, N, M]``.
    """
    unit = torch.nn.functional.normalize(features.to(dtype), dim=-1)
    if others is not None:
        return torch.bmm(unit, torch.nn.functional.normalize(others.to(dtype), dim=-1).transpose(1, 2))
    size = unit.shape[1]
    block = max(-(-size // _BLOCKS), _SMALLEST_BLOCK)
    out = unit.new_empty(unit.shape[0], size, size)
    for start in range(0, size, block):
        end = min(start + block, size)
        products = torch.bmm(unit[:, start:end], unit[:, start:].transpose(1, 2))
        out[:, start:end, start:] = products
        out[:, end:, start:end] = products[:, :, end - start :].transpose(1, 2)
    return out


def without_noise(cosines: Tensor) -> Tensor:
    """Round cosines in float64 to about 1e-10, so that copies tie however their products were summed."""
    return (cosines * _GRID).round() / _GRID


def open_scores(scores: Tensor, taken: Tensor) -> Tensor:
    """Return scores ``[B, N]`` in float32 with the taken tokens (``[B, N]`` bool) below all others, even below NaN."""
    most = torch.finfo(torch.float32).max / 2
    return scores.float().nan_to_num(nan=-most).clamp(-most, most).masked_fill(taken, -torch.inf)


def take_best(scores: Tensor, taken: Tensor, noise: float = RESOLUTION) -> Tensor:
    """Return the token with the highest score among those not taken ``[B, 1]``, and mark it taken.

    Ties go to the lower index. Scores that are behind the highest by a share of at most `noise` tie with it: where
    copies or the two ends of a pair have equal scores, the order in which float32 sums them up must not decide.

    Parameters
    ----------
    scores
        ``[B, N]``; NaN counts as lowest.
    taken
        ``[B, N]`` bool, changed in place.
    """
    scores = open_scores(scores, taken)
    highest = scores.amax(dim=1, keepdim=True)
    index = torch.arange(scores.shape[1], device=scores.device)
    ties = scores >= highest - noise * highest.abs()
    best = torch.where(ties, index, len(index)).amin(dim=1, keepdim=True)
    taken.scatter_(1, best, True)
    return best


def row_of(matrix: Tensor, token: Tensor) -> Tensor:
    """Return one row ``[B, M]`` per crop of matrices ``[B, N, M]``; the tokens are ``[B, 1]``."""
    return matrix.take_along_dim(token[:, :, None], dim=1).squeeze(1)


def added_coverage(matrix: Tensor, covered: Tensor) -> Tensor:
    """Return how much each token would add to what is covered, ``[B, N]``.

    Parameters
    ----------
    matrix
        ``[B, N, M]``: how well each token covers each of M elements.
    covered
        ``[B, M]``: how well each element is covered so far.
    """
    rows = max(1, _ENTRIES // (len(matrix) * matrix.shape[2]))
    parts = torch.split(matrix, rows, dim=1)
    return torch.cat([(part - covered[:, None]).relu_().sum(dim=-1) for part in parts], dim=1)


def ranks(scores: Tensor) -> Tensor:
    """Return the place of each token ``[B, N]`` when scores are sorted as in `descending`, from 0."""
    return descending(scores).argsort(dim=-1)


def min_max(scores: Tensor) -> Tensor:
    """Bring scores ``[B, N]`` to 0..1 within each crop; ones where they hardly differ. NaN counts as lowest."""
    scores = scores.float()
    unknown = scores.isnan()
    low = scores.masked_fill(unknown, torch.inf).amin(dim=1, keepdim=True)
    high = scores.masked_fill(unknown, -torch.inf).amax(dim=1, keepdim=True)
    spread = high - low
    scaled = (torch.where(unknown, low, scores) - low) / (spread + 1e-6)
    return torch.where(spread > RESOLUTION, scaled, 1.0)


def make_room(anchors: Tensor, size: int, front: int = 0, back: int = 0) -> Tensor:
    """Shift anchors ``[B, K]``, ascending and distinct among `size` places, as little as leaves the ends free.

    Merged tokens without an anchor of their own then take the first `front` and the last `back` places. Needs
    ``front + K + back <= size``; the order of the anchors stays.
    """
    count = anchors.shape[1]
    rank = torch.arange(count, device=anchors.device)
    return anchors.maximum(rank + front).minimum(rank + size - back - count)
