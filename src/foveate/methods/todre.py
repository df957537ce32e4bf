"""ToDRE, stage 1: tokens that point in directions as different as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.probes import Attention, Embeddings
from foveate.ranking import cosine_matrix, row_of, take_best
from foveate.reducer import Reducer, register
from foveate.selection import Selection
from foveate.tokens import CropBatch, VisualTokens


@register("todre")
@dataclass(frozen=True)
class ToDRE(Reducer):
    """ToDRE (arXiv 2505.18757), stage 1 only: greedy diversity from a salient pivot.

    The first token is the one with the most ``[CLS]`` attention ``[N]``; each further one is the least similar to those
    picked, by cosines of embeddings ``[N, D]``. The method's second stage drops all visual tokens in a late layer of
    the LLM and is not part of this.

    Parameters
    ----------
    keep
        The budget T.
    criterion
        ``"max_sum"``: similar means the sum of the cosines with all picked tokens (version 2 of the paper). It takes
        extremes, and possibly near copies among them. ``"k_center"``: the largest of these cosines (version 1).

    Notes
    -----
    Cosines are computed once, ``O(N^2 D)``; each pick then costs ``O(N)``.

    Deviations from the paper: each crop, tile or frame starts from its own pivot. With a joint budget there is a single
    one among all tokens; on tiles the paper takes it from the thumbnail. Newline vectors do not compete. The pivot's
    attention is that of the layer that makes the features (UNVERIFIED), or the attention that each token receives where
    the encoder has no ``[CLS]``.
    """

    criterion: Literal["max_sum", "k_center"] = "max_sum"

    needs = (Embeddings(), Attention())
    paper = "arXiv:2505.18757"
    complexity = "O(N^2 D + T N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in ("max_sum", "k_center"):
            raise FoveateError(f"criterion is 'max_sum' or 'k_center', not {self.criterion!r}")

    def select(self, tokens: VisualTokens) -> Selection:
        return tokens.per_crop(self.keep, self.pick)

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        similarity = cosine_matrix(crops.probe(Embeddings()))
        saliency = crops.probe(Attention())
        taken = torch.zeros_like(saliency, dtype=torch.bool)
        picks = [take_best(saliency, taken)]
        closeness = row_of(similarity, picks[0])
        while len(picks) < count:
            picks.append(take_best(-closeness, taken))
            row = row_of(similarity, picks[-1])
            closeness = closeness + row if self.criterion == "max_sum" else torch.maximum(closeness, row)
        return torch.cat(picks, dim=1)
