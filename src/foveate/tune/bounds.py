"""How sure a figure of a few prompts is: one-sided confidence bounds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median


@dataclass(frozen=True)
class Estimate:
    """A figure, and bounds that it lies above and below, each with the stated confidence."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return the figures as JSON-compatible data."""
        return {"value": round(self.value, 6), "at_least": round(self.low, 6), "at_most": round(self.high, 6)}


def disagreement(differs: Sequence[bool], clusters: Sequence[Hashable], confidence: float) -> Estimate:
    """Estimate a share of differing answers, with the bounds of Clopper and Pearson (1934).

    Questions about one image are no independent draws: following Korn and Graubard (1998), their number is divided by
    the design effect before the bounds are taken, and both counts are rounded to the side that widens the bounds.

    Parameters
    ----------
    differs
        Per prompt.
    clusters
        Per prompt what it shares with prompts that are not independent of it: its images.
    """
    n, found = len(differs), sum(differs)
    effect = design_effect([float(d) for d in differs], clusters)
    size = max(1, int(n / effect))
    few, many = math.floor(found / effect), min(size, math.ceil(found / effect))
    alpha = 1 - confidence
    low = 0.0 if few == 0 else _root(lambda p: 1 - _below(few - 1, size, p) - alpha)
    high = 1.0 if many == size else _root(lambda p: alpha - _below(many, size, p))
    return Estimate(found / n, low, high)


def drop(lost: Sequence[int], clusters: Sequence[Hashable], confidence: float) -> Estimate:
    """Estimate a drop of accuracy, with the adjusted paired bounds of Bonett and Price (2012).

    Parameters
    ----------
    lost
        Per prompt 1 if only the unpruned model was right, -1 if only the pruned one was, else 0.
    clusters
        As in `disagreement`; the number of prompts is divided by the design effect here, too.
    """
    n = len(lost)
    effect = design_effect([float(x) for x in lost], clusters)
    size = n / effect
    worse, better = ((sum(x == sign for x in lost) / effect + 1) / (size + 2) for sign in (1, -1))
    half = NormalDist().inv_cdf(confidence) * math.sqrt((worse + better - (worse - better) ** 2) / (size + 2))
    return Estimate(sum(lost) / n, max(-1.0, worse - better - half), min(1.0, worse - better + half))


def middle(values: Sequence[float], confidence: float) -> Estimate:
    """Estimate a median, with the bounds of the sign test; too few values bound nothing beyond the extreme ones."""
    ordered, n = sorted(values), len(values)
    rank = 0
    while rank < n and _below(rank, n, 0.5) <= 1 - confidence:
        rank += 1
    outer = max(rank - 1, 0)  # so many values may lie beyond the median by chance
    return Estimate(median(ordered), ordered[outer], ordered[n - 1 - outer])


def design_effect(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Return by which factor the variance of a mean exceeds that of independent draws, at least 1."""
    mean, n = fmean(values), len(values)
    groups: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        groups[cluster] += value - mean
    alone = sum((value - mean) ** 2 for value in values)
    count = len(groups)
    if not alone or n == count:
        return 1.0
    if count == 1:
        return float(n)
    together = sum(total**2 for total in groups.values())
    return max(1.0, together * count / (count - 1) / (alone * n / (n - 1)))


def _below(k: int, n: int, p: float) -> float:
    """Return the probability of at most `k` successes in `n` draws."""
    if p <= 0.0 or p >= 1.0:
        return float(p <= 0.0 or k >= n)
    log, base = math.log(p) - math.log1p(-p), n * math.log1p(-p)
    terms = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log + base for i in range(k + 1))
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def _root(rising: Callable[[float], float]) -> float:
    """Return where a rising function on [0, 1] crosses zero, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        mid = (low + high) / 2
        low, high = (mid, high) if rising(mid) < 0 else (low, mid)
    return (low + high) / 2
