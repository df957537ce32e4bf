"""What became of each token: kept, merged into another, or dropped."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foveate.core.selection import SpanSelection


@dataclass(frozen=True, eq=False)
class Fate:
    """What became of the N tokens of a span.

    Attributes
    ----------
    places
        ``[N]`` bool: where a token of the language model sits.
    into
        ``[N]`` int64: the kept token (its rank among the kept) that a token ends up in, the one with the largest
        weight if there are several; -1 if it is dropped.
    """

    places: NDArray[np.bool_]
    into: NDArray[np.int64]

    @property
    def alive(self) -> NDArray[np.bool_]:
        """``[N]`` bool: what reaches the language model, by itself or in a merged token."""
        return self.into >= 0

    def shared(self) -> NDArray[np.int64]:
        """Return `into` where several tokens end up together, and -1 elsewhere."""
        sizes = np.bincount(self.into[self.alive], minlength=1)
        return np.where(self.alive & (sizes[self.into] > 1), self.into, -1)

    def counts(self) -> dict[str, int]:
        """Return how many tokens there are of each kind; together they are N."""
        merged = int((self.alive & ~self.places).sum())
        kept = int(self.places.sum())
        return {"kept": kept, "merged": merged, "dropped": len(self.into) - kept - merged}


def fate(chosen: SpanSelection) -> Fate:
    """Return what a selection makes of each token of its span."""
    kept = chosen.kept.cpu().numpy()
    places, into = np.zeros(chosen.length, dtype=bool), np.full(chosen.length, -1)
    places[kept] = True
    if chosen.merge is None:
        into[kept] = np.arange(len(kept))
        return Fate(places, into)
    target, source, weight = (x.cpu().numpy() for x in (chosen.merge.target, chosen.merge.source, chosen.merge.weight))
    flows = (source < chosen.length) & (weight != 0)  # sources behind the span are no tokens of it
    target, source, weight = target[flows], source[flows], np.abs(weight[flows])
    order = np.lexsort((-target, weight))  # numpy keeps the last of several values: the largest, then lowest target
    into[source[order]] = target[order]
    return Fate(places, into)


def first_kept(selections: Sequence[SpanSelection]) -> NDArray[np.int64]:
    """Return the first of several selections of a span that keeps each token, ``[N]``, -1 where none does."""
    first = np.full(selections[0].length, -1)
    for i in reversed(range(len(selections))):
        first[selections[i].kept.cpu().numpy()] = i
    return first


def hue(number: int) -> tuple[float, float, float]:
    """Return the colour of a group of merged tokens; neighbouring numbers are far apart on the colour wheel."""
    turn = number * 0.6180339887498949  # the golden ratio
    return colorsys.hls_to_rgb(turn % 1.0, 0.58 if number % 2 else 0.48, 0.75)
