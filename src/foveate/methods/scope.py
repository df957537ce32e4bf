"""SCOPE: tokens that are salient and cover what no picked token covers yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register


@register("scope")
@dataclass(frozen=True)
class SCOPE(CropReducer):
    """SCOPE (arXiv 2510.24214, NeurIPS 2025): greedy coverage of all tokens, weighted by ``[CLS]`` attention.

    A token is covered as well as its most similar picked one has a positive cosine with it, of features ``[N, C]``.
    Each pick maximises what it adds to the coverage of all tokens, times its attention ``[N]`` to the power of `alpha`.

    Parameters
    ----------
    keep
        The budget T.
    alpha
        Exponent of the attention, at least 0; with 0 coverage alone counts.

    Notes
    -----
    Cosines are computed once, ``O(N^2 C)``; each pick reads them all, so that T picks cost ``O(T N^2)``. On a CPU it
    reads those of a few tokens, and the picks are the same, see `ranking.cover`.

    Deviations from the paper: encoders without ``[CLS]`` use the attention that each token receives (UNVERIFIED), and
    where a model merges patches, the merged tokens of each image by itself. Once every token is covered (no pick would
    add more than 1e-6 per token), the most salient follow, where the published rule takes the first. Ties go to the
    lower index.
    """

    alpha: float = 1.0

    needs = (probes.Features(), probes.Attention())
    paper = "arXiv:2510.24214"
    complexity = "O(N^2 C + T N^2)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha < float("inf"):
            raise FoveateError(f"alpha is a finite exponent of at least 0, not {self.alpha}: 1 is the published value")

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        similarity = ranking.cosine_matrix(crops.probe(probes.Features()))
        saliency = crops.probe(probes.Attention()).float()
        taken = torch.zeros_like(saliency, dtype=torch.bool)
        # Tokens that add nothing rank among each other by saliency, and below all others.
        return ranking.cover(similarity, count, taken, weight=saliency**self.alpha, spent=-1 / saliency)
