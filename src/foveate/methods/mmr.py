"""MMR: maximal marginal relevance, salient tokens that are unlike those already picked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register


@register("mmr")
@dataclass(frozen=True)
class MMR(CropReducer):
    """Maximal marginal relevance: the selector of IDPruner, with ``[CLS]`` attention in place of its trained scorer.

    The first token is the one with the most attention ``[N]``. Each further one maximises ``balance`` times its
    attention, brought to 0..1 in each crop, minus ``1 - balance`` times its largest cosine, of embeddings ``[N, D]``,
    with a picked token.

    Parameters
    ----------
    keep
        The budget T.
    balance
        Weight of the attention against diversity, from 0 to 1. With 1 this is FasterVLM; with 0 all but the first
        token are as far as possible from those before them.

    Notes
    -----
    Costs ``O(N^2 D)`` for up to 1,024 tokens, and ``O(N)`` per pick. Of more tokens only the cosines with picked ones
    are computed, in single rows or, on a CPU, along with those of the next best tokens.

    Deviations from the paper: IDPruner trains its scorer. Attention instead needs no training, and is UNVERIFIED
    against its numbers. Encoders without ``[CLS]`` use the attention that each token receives. One token is picked at a
    time.
    """

    balance: float = 0.5

    needs = (probes.Embeddings(), probes.Attention())
    complexity = "O(N^2 D + T N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.balance <= 1.0:
            raise FoveateError(f"balance is a weight from 0 to 1, not {self.balance}")

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        cosines = ranking.CosineRows(crops.probe(probes.Embeddings()))
        saliency = ranking.min_max(crops.probe(probes.Attention()))
        taken = torch.zeros_like(saliency, dtype=torch.bool)
        picks = [ranking.take_best(saliency, taken)]
        closest = cosines.of(picks[0], saliency)
        while len(picks) < count:
            score = self.balance * saliency - (1 - self.balance) * closest
            picks.append(ranking.take_best(score, taken))
            closest = torch.maximum(closest, cosines.of(picks[-1], score.masked_fill(taken, -torch.inf)))
        return torch.cat(picks, dim=1)
