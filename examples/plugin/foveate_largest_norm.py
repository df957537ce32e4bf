"""The tokens with the longest feature vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.author import CropBatch, CropReducer, probes, ranking


@dataclass(frozen=True)
class LargestNorm(CropReducer):
    """Keep the tokens whose features have the largest norm.

    Parameters
    ----------
    keep
        The budget.
    order
        Which norm: 2 is the Euclidean one.
    """

    order: float = 2.0

    needs = (probes.Features(),)

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        return ranking.top(crops.probe(probes.Features()).float().norm(p=self.order, dim=-1), count)
