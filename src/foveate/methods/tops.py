"""TOPS, stage I: tokens that are salient, unlike the picked ones, and cover the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register


@register("tops")
@dataclass(frozen=True)
class TOPS(CropReducer):
    """TOPS (2026), stage I only: saliency plus diversity plus residual coverage, one pick at a time.

    The first token is the one with the most ``[CLS]`` attention ``[N]``. Each further one maximises the sum of three
    terms, each divided by its mean over the tokens that are left: attention; one minus the largest cosine, of
    embeddings ``[N, D]``, with a picked token; and by how much it is more similar than any picked token to the tokens
    that are left, summed over these. The method's second stage prunes inside the LLM and is not part of this: in the
    full method stage I keeps twice the final number of tokens.

    Parameters
    ----------
    keep
        The budget T.
    diversity, coverage
        Weights of the second and the third term, at least 0.

    Notes
    -----
    Cosines are computed once, ``O(N^2 D)``; each pick reads them all, so that T picks cost ``O(T N^2)``. Of more than
    1,024 tokens on a CPU, a pick reads only the cosines of tokens to which it is closer than all picks before it.

    Deviations from the paper: the formulas are those of a public repository's text, the paper's identifier is not
    known (UNVERIFIED). Encoders without ``[CLS]`` use the attention that each token receives. A term whose mean is zero
    (in float32: at most 1e-6, per token for the coverage) drops out. Ties go to the lower index.
    """

    diversity: float = 0.5
    coverage: float = 0.5

    needs = (probes.Embeddings(), probes.Attention())
    complexity = "O(N^2 D + T N^2)"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("diversity", "coverage"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise FoveateError(f"{name} is a finite weight of at least 0, not {getattr(self, name)}")

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        similarity = ranking.cosine_matrix(crops.probe(probes.Embeddings()))
        saliency = crops.probe(probes.Attention()).float()
        taken = torch.zeros_like(saliency, dtype=torch.bool)
        picks = [ranking.take_best(saliency, taken)]
        closest = ranking.row_of(similarity, picks[0])
        coverage = ranking.AddedCoverage(similarity)
        while len(picks) < count:
            gain = coverage.beyond(closest)  # of tokens left: picked ones are covered by themselves
            scores = (
                _relative(saliency, taken, len(picks), 0.0)
                + self.diversity * _relative(1 - closest, taken, len(picks), ranking.RESOLUTION)
                + self.coverage * _relative(gain, taken, len(picks), ranking.RESOLUTION * crops.size)
            )
            picks.append(ranking.take_best(scores, taken))
            closest = torch.maximum(closest, ranking.row_of(similarity, picks[-1]))
        return torch.cat(picks, dim=1)


def _relative(values: Tensor, taken: Tensor, picked: int, least: float) -> Tensor:
    """Divide values ``[B, N]`` by their mean over the tokens not taken; a mean of at most `least` gives zeros."""
    mean = values.masked_fill(taken, 0.0).sum(dim=1, keepdim=True) / (values.shape[1] - picked)
    return torch.where(mean > least, values / mean, 0.0)
