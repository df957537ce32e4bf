"""Greedy determinants of many tokens on a CPU: what is left of a token is worked out where it may win."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FROM = 1025
"""Tokens from which on `LazyDeterminant` is the form to use on a CPU."""

_LEAST_POOL, _MOST_POOL, _PER_PICK = 64, 1024, 16  # tokens
_TOGETHER = 64  # picks: tokens that lag behind by about as many are brought up to date together


class LazyDeterminant:
    """Maximises ``det(K) * prod(weight)`` greedily for one crop, without a kernel of all pairs.

    What is left of a token beside the picked ones never grows. So what was left of it once bounds its score, and only
    tokens whose bound could win are brought up to date: those with the highest bounds make a pool, whose own kernel
    tells the picks until a token outside could win. Follows a Cholesky factor of K in float64, a row per token.

    Parameters
    ----------
    rows
        Gives the vectors ``[k, C]`` of some tokens; their products make the kernel.
    diagonal
        ``[N]`` float64: K of each token with itself.
    score
        Gives the scores ``[k]`` of what is left ``[k]`` of some tokens ``[k]``; must not rise where less is left.
    count
        Number of picks to come.
    noise
        Share of the highest score by which others tie with it; ties go to the lower index.
    floor
        What is left counts as at least so much where it is divided by.
    factor
        Gives factors ``[a, b]`` on the products of tokens ``[a]`` with others ``[b]``; by default 1.
    taken
        ``[N]`` bool: tokens that may not be picked; by default none.
    """

    def __init__(
        self,
        rows: Callable[[Tensor], Tensor],
        diagonal: Tensor,
        score: Callable[[Tensor, Tensor], Tensor],
        count: int,
        noise: float,
        floor: float,
        factor: Callable[[Tensor, Tensor], Tensor | float] = lambda _, __: 1.0,
        taken: Tensor | None = None,
    ):
        self._rows, self._score, self._factor = rows, score, factor
        self._count, self._noise, self._floor = count, noise, floor
        bounds = self._scores(diagonal, torch.arange(len(diagonal)))
        self._bounds = bounds if taken is None else bounds.masked_fill(taken, -torch.inf)
        self._diagonal, self._left = diagonal, diagonal.clone()
        self._basis = diagonal.new_zeros(len(diagonal), count)
        self._seen = torch.zeros(len(diagonal), dtype=torch.long)  # how many picks are worked into a token's row
        self._picks: list[int] = []
        self._factors = diagonal.new_zeros(count, count)  # of the picked tokens among themselves
        example = rows(torch.arange(1))
        self._vectors = example.new_zeros(count, example.shape[1])  # of the picked tokens

    def pick(self) -> Tensor:
        """Return tokens ``[count]`` in the order of picking."""
        size = _LEAST_POOL
        while (before := len(self._picks)) < self._count:
            self._pick_from(self._pool(size))
            made = len(self._picks) - before
            # Without a pick, more tokens tie than the pool has.
            size = min(max(_LEAST_POOL, _PER_PICK * made), _MOST_POOL) if made else 2 * size
        return torch.tensor(self._picks, dtype=torch.long)

    def _scores(self, left: Tensor, tokens: Tensor) -> Tensor:
        most = torch.finfo(left.dtype).max / 2
        return self._score(left, tokens).nan_to_num(nan=-most, posinf=most, neginf=-most)

    def _pool(self, size: int) -> Tensor:
        """Return the tokens with the highest bounds, in raster order and up to date."""
        while True:
            order = self._bounds.argsort(descending=True, stable=True)[:size]
            pool = order[self._bounds[order] > -torch.inf]
            stale = pool[self._seen[pool] < len(self._picks)]
            if not len(stale):
                return pool.sort().values
            lag = self._seen[stale].div(_TOGETHER, rounding_mode="floor")
            for group in sorted(set(lag.tolist())):
                self._update(stale[lag == group])

    def _update(self, tokens: Tensor) -> None:
        """Work the picks into the rows of some tokens, from the first on that any of them has not seen."""
        start, end = int(self._seen[tokens].min()), len(self._picks)
        factor = self._factor(torch.tensor(self._picks[start:]), tokens)
        rest = (self._vectors[start:end] @ self._rows(tokens).T * factor).double()
        rest -= self._factors[start:end, :start] @ self._basis[tokens, :start].T
        new = torch.linalg.solve_triangular(self._factors[start:end, start:end], rest, upper=False)
        self._basis[tokens, start:end] = new.T
        self._left[tokens] = self._diagonal[tokens] - self._basis[tokens, :end].square().sum(dim=1)
        self._seen[tokens] = end
        self._bounds[tokens] = self._scores(self._left[tokens], tokens)

    def _pick_from(self, pool: Tensor) -> None:
        """Pick tokens of the pool until one outside could be better, or tie and come first."""
        vectors = self._rows(pool)
        kernel = (vectors @ vectors.T * self._factor(pool, pool)).double()
        basis, left, bounds = self._basis[pool], self._left[pool], self._bounds[pool]
        outside = self._bounds.index_fill(0, pool, -torch.inf)
        rival = float(outside.max())
        while len(self._picks) < self._count:
            t, highest = len(self._picks), float(bounds.max())
            least = highest - self._noise * abs(highest)
            best = int((bounds >= least).byte().argmax())
            token = int(pool[best])
            if rival > highest or (rival >= least and bool((outside[:token] >= least).any())) or highest == -torch.inf:
                break
            scale = left[best].clamp(min=self._floor).sqrt()
            row = (kernel[best] - basis[:, :t] @ basis[best, :t]) / scale
            self._factors[t, :t], self._factors[t, t] = basis[best, :t], scale
            self._vectors[t], basis[:, t] = vectors[best], row
            left = left - row.square()
            self._picks.append(token)
            taken = bounds == -torch.inf
            taken[best] = True
            bounds = self._scores(left, pool).masked_fill(taken, -torch.inf)
        self._basis[pool], self._left[pool], self._bounds[pool] = basis, left, bounds
        self._seen[pool] = len(self._picks)
