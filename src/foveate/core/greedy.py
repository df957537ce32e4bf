"""Greedy picks, of which each looks at few tokens: those that add most to how well all elements are covered."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from foveate.core.ranking import RESOLUTION, added_coverage, open_scores, row_of, take_best

_LAZY_FROM = 256  # tokens: of fewer, all are looked at sooner than the few are told


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
        Share by which scores that should be equal may differ; see `ranking.take_best`.
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
        own = (None if x is None else x[tokens] for x in (self._weight, self._spent))
        scores = _scores(added, *own, len(self._matrix))[None]
        return open_scores(scores, torch.zeros_like(scores, dtype=torch.bool))[0]
