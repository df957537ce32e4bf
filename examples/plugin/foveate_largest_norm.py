"""The tokens with the longest feature vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate import Reducer, Selection, VisualTokens
from foveate.core.probes import Features
from foveate.core.ranking import top
from foveate.core.tokens import CropBatch


@dataclass(frozen=True)
class LargestNorm(Reducer):
    """Keep the tokens whose features have the largest norm.

    Parameters
    ----------
    keep
        The budget.
    order
        Which norm: 2 is the Euclidean one.
    """

    order: float = 2.0

    needs = (Features(),)

    def select(self, tokens: VisualTokens) -> Selection:
        def pick(crops: CropBatch, count: int) -> Tensor:
            return top(crops.probe(Features()).float().norm(p=self.order, dim=-1), count)

        return tokens.per_crop(self.keep, pick)
