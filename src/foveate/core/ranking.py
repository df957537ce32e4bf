"""Ranking and similarity helpers that methods share: float32, stable, ties to the lower index."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Of b blocks a triangle has (b + 1) / 2b of the products; small blocks multiply slower.
_BLOCKS, _SMALLEST_BLOCK = 5, 64

_LAZY_FROM = 256  # tokens: of fewer, all are looked at sooner than the few are told

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


def cover(
    matrix: Tensor,
    count: int,
    taken: Tensor,
    noise: float = RESOLUTION,
    slack: float = 0.0,
    weight: Tensor | None = None,
    spent: Tensor | None = None,
) -> Tensor:
    """Pick tokens greedily for the sum over all elements of how well the best picked token covers them.

    What a token adds never rises from pick to pick, not in float32 either, as each sum is added in one order. So on a
    CPU what it added once bounds what it adds now, and only tokens whose bound could win are summed up anew: the picks
    are the same to the bit. On other devices all are summed up at each pick, so that nothing waits for the device.

    Parameters
    ----------
    matrix
        ``[B, N, M]``: how well each token covers each element; less than 0 is not at all.
    taken
        ``[B, N]`` bool: tokens that may not be picked; may be changed in place.
    noise
        Share by which scores that should be equal may differ; see `take_best`.
    slack
        Share by which entries that should be equal may differ: copies of picked tokens add nothing.
    weight, spent
        ``[B, N]``, weights not negative. Scores are what tokens add times `weight`, and `spent`, which is below all
        such, of tokens that add at most 1e-6 per token. By default what tokens add is the score.

    Returns
    -------
    Tensor
        ``[B, count]`` int64 in the order of picking.
    """
    covered = torch.zeros_like(matrix[:, 0])
    scores = _scores(added_coverage(matrix, covered), weight, spent, matrix.shape[1])
    if matrix.device.type == "cpu" and matrix.shape[1] >= _LAZY_FROM and not torch.compiler.is_compiling():
        bounds = open_scores(scores, taken)
        weights, left = ([None] * len(matrix) if x is None else list(x) for x in (weight, spent))
        crops = zip(matrix, bounds, weights, left, strict=True)
        return torch.stack([_Coverage(m, b, noise, slack, w, s).pick(count) for m, b, w, s in crops])
    picks = [take_best(scores, taken, noise)]
    while len(picks) < count:
        covered = torch.maximum(covered, row_of(matrix, picks[-1]) * (1 + slack))
        scores = _scores(added_coverage(matrix, covered), weight, spent, matrix.shape[1])
        picks.append(take_best(scores, taken, noise))
    return torch.cat(picks, dim=1)


def _scores(added: Tensor, weight: Tensor | None, spent: Tensor | None, size: int) -> Tensor:
    if weight is None or spent is None:
        return added
    return torch.where(added > RESOLUTION * size, weight * added, spent)


class Lazy(ABC):
    """Greedy picks from the tokens of a crop whose scores never rise from pick to pick.

    Scores once computed bound those of later, so that only tokens are looked at again whose bound could win.

    Parameters
    ----------
    bounds
        ``[N]``, at first the scores; minus infinity where a token may not be picked. Changed in place.
    noise
        Share of the highest score by which others tie with it; ties go to the lower index.
    """

    first_look = 8

    def __init__(self, bounds: Tensor, noise: float):
        self.bounds, self._noise = bounds, noise
        self._exact = torch.ones_like(bounds, dtype=torch.bool)

    @abstractmethod
    def scores(self, tokens: Tensor) -> Tensor:
        """Return the scores of some tokens ``[K]`` as they are now."""

    @abstractmethod
    def take(self, token: int) -> None:
        """Take note of a pick."""

    def pick(self, count: int) -> Tensor:
        """Return tokens ``[count]`` in the order of picking."""
        picks = []
        for _ in range(count):
            picks.append(self._best())
            self.bounds[picks[-1]] = -torch.inf
            self.take(picks[-1])
            self._exact = self.bounds == -torch.inf
        return torch.tensor(picks, dtype=torch.long)

    def _best(self) -> int:
        look = self.first_look
        while True:
            exact = torch.where(self._exact, self.bounds, -torch.inf)
            highest = float(exact.max())
            least = max(highest - self._noise * abs(highest), torch.finfo(exact.dtype).min)
            best = int((exact >= least).byte().argmax())
            # Others count if they may be higher, or if they may tie and come first.
            due = self.bounds > highest
            due[:best] |= self.bounds[:best] >= least
            due &= ~self._exact
            left = int(due.sum())
            if not left:
                return best
            tokens = torch.where(due, self.bounds, -torch.inf).topk(min(look, left)).indices
            self.bounds[tokens], self._exact[tokens] = self.scores(tokens), True
            look *= 2


class _Coverage(Lazy):
    """The tokens of a crop ``[N, M]`` by what they add to the coverage."""

    def __init__(
        self, matrix: Tensor, bounds: Tensor, noise: float, slack: float, weight: Tensor | None, spent: Tensor | None
    ):
        super().__init__(bounds, noise)
        self._matrix, self._slack, self._weight, self._spent = matrix, slack, weight, spent
        self._covered = torch.zeros_like(matrix[0])

    def take(self, token: int) -> None:
        self._covered = torch.maximum(self._covered, self._matrix[token] * (1 + self._slack))

    def scores(self, tokens: Tensor) -> Tensor:
        added = added_coverage(self._matrix[tokens][None], self._covered[None])[0]
        weight, spent = (None if x is None else x[tokens] for x in (self._weight, self._spent))
        scores = _scores(added, weight, spent, len(self._matrix))[None]
        return open_scores(scores, torch.zeros_like(scores, dtype=torch.bool))[0]
