"""Ranking and similarity helpers that methods share: float32, stable, ties to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor

# Of b blocks a triangle has (b + 1) / 2b of the products; small blocks multiply slower, large ones take memory.
_BLOCKS, _SMALLEST_BLOCK, _LARGEST_BLOCK = 5, 64, 256

_WHOLE, _AT_ONCE = 1024, 32

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


def cosine_matrix(
    features: Tensor,
    others: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    rounded: torch.dtype | None = None,
    among: Tensor | None = None,
) -> Tensor:
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
    rounded
        The dtype of the result, if it is another one. Of features among themselves, no matrix is made in `dtype`.
    among
        ``[B, R]``: the tokens that are compared, in this order; by default all N.

    Returns
    -------
    Tensor
        ``[B, N, M]``.
    """
    unit = torch.nn.functional.normalize(features.to(dtype), dim=-1)
    if among is not None:
        unit = unit.gather(1, among[..., None].expand(-1, -1, unit.shape[-1]))
    if others is not None:
        products = torch.bmm(unit, torch.nn.functional.normalize(others.to(dtype), dim=-1).transpose(1, 2))
        return products.to(rounded or dtype)
    size = unit.shape[1]
    block = min(max(-(-size // _BLOCKS), _SMALLEST_BLOCK), _LARGEST_BLOCK)
    out = unit.new_empty(unit.shape[0], size, size, dtype=rounded or dtype)
    for start in range(0, size, block):
        end = min(start + block, size)
        # bmm copies a part of each of several crops, but not the end of a single one.
        others = unit[0, start:][None] if len(unit) == 1 else unit[:, start:]
        products = torch.bmm(unit[:, start:end], others.transpose(1, 2)).to(out.dtype)
        out[:, start:end, start:] = products
        out[:, end:, start:end] = products[:, :, end - start :].transpose(1, 2)
    return out


class CosineRows:
    """Rows of the matrix of cosines of tokens, for those who read few of them.

    Up to 1,024 tokens the matrix is computed as a whole. Of more, a row is computed when it is asked for. A CPU takes
    as long to read all tokens for one row as to multiply them for many, so there the rows of other likely tokens are
    computed along with it, and none of them twice.

    Parameters
    ----------
    features
        ``[B, N, C]``.
    """

    def __init__(self, features: Tensor):
        self._matrix = cosine_matrix(features) if features.shape[1] <= _WHOLE else None
        self._unit = torch.nn.functional.normalize(features.float(), dim=-1) if self._matrix is None else features
        self._known: list[dict[int, Tensor]] = [{} for _ in features]

    def of(self, token: Tensor, scores: Tensor) -> Tensor:
        """Return the cosines ``[B, N]`` of one token per crop ``[B, 1]``.

        Parameters
        ----------
        token
            ``[B, 1]``.
        scores
            ``[B, N]``: the higher the score of another token, the sooner it is expected; those at minus infinity never.
        """
        if self._matrix is not None:
            return row_of(self._matrix, token)
        if self._unit.device.type != "cpu" or torch.compiler.is_compiling():  # which must not wait for values
            one = self._unit.take_along_dim(token[:, :, None], dim=1)
            return torch.bmm(self._unit, one.transpose(1, 2)).squeeze(-1)
        return torch.stack([self._row(i, int(number), scores[i]) for i, number in enumerate(token[:, 0])])

    def _row(self, crop: int, token: int, scores: Tensor) -> Tensor:
        known = self._known[crop]
        if token not in known:
            unknown = scores.nan_to_num(nan=-torch.inf)
            unknown[[token, *known]] = -torch.inf
            likely = unknown.topk(min(_AT_ONCE, len(unknown)) - 1).indices
            rows = torch.cat([likely.new_tensor([token]), likely[unknown[likely] > -torch.inf]])
            unit = self._unit[crop]
            known.update(zip(rows.tolist(), (unit @ unit[rows].T).T.contiguous(), strict=True))
        return known[token]


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
    best = (scores >= highest - noise * highest.abs()).byte().argmax(dim=1, keepdim=True)
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


class AddedCoverage:
    """`added_coverage` of tokens among themselves while they are more and more covered.

    Up to 1,024 tokens, and on a GPU, it is summed up anew each time. Of more, a CPU takes off, in float64, what came in
    between: only the elements that are better covered than the time before are read.

    Parameters
    ----------
    matrix
        ``[B, N, N]`` symmetric: how well each token covers each.
    """

    def __init__(self, matrix: Tensor):
        self._matrix = matrix
        self._covered: list[Tensor] = []
        self._gains: list[Tensor] = []
        self._differs = matrix.shape[1] > _WHOLE and matrix.device.type == "cpu" and not torch.compiler.is_compiling()

    def beyond(self, covered: Tensor) -> Tensor:
        """Return how much each token would add to what is covered, ``[B, N]``, which is never less than before."""
        if not self._differs:
            return added_coverage(self._matrix, covered)
        if not self._gains:
            self._gains = [self._added(i, row.new_ones(len(row)).bool(), row) for i, row in enumerate(covered)]
        else:
            for i, (before, now) in enumerate(zip(self._covered, covered, strict=True)):
                better = now > before
                self._gains[i] = self._gains[i] - self._added(i, better, before) + self._added(i, better, now)
        self._covered = list(covered)
        return torch.stack(self._gains).float()

    def _added(self, crop: int, elements: Tensor, covered: Tensor) -> Tensor:
        """Return what each token would add to some elements ``[N]`` bool of a crop, ``[N]`` float64."""
        added = self._matrix.new_zeros(self._matrix.shape[1], dtype=torch.float64)
        for part in torch.split(elements.nonzero()[:, 0], _AT_ONCE):
            rows = self._matrix[crop].index_select(0, part)
            added += rows.sub_(covered[part, None]).relu_().sum(dim=0, dtype=torch.float64)
        return added


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
