"""Ranking and similarity helpers that methods share: float32, stable, ties to the lower index."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Of b blocks a triangle has (b + 1) / 2b of the products; small blocks multiply slower, large ones take memory.
_BLOCKS, _SMALLEST_BLOCK, _LARGEST_BLOCK = 5, 64, 256

_WHOLE, _AT_ONCE = 1024, 32

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
