"""DivPrune: the tokens that lie furthest apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, probes, ranking, register

_AT_ONCE = 2**20  # distances


@register("divprune")
@dataclass(frozen=True)
class DivPrune(CropReducer):
    """DivPrune (arXiv 2503.02175, CVPR 2025): greedy max-min diversity of the projected tokens.

    The distance of two tokens is one minus the cosine of their embeddings ``[N, D]``. The first token is the one whose
    nearest neighbour is furthest away; each further one is the one furthest from its nearest among those picked.
    Reads neither attention nor the question.

    Parameters
    ----------
    keep
        The budget T. The paper selects among all crops of an image, or frames of a clip, at once: that is
        ``keep=Budget(T, per="joint")``, quadratic in their number of tokens.

    Notes
    -----
    Cosines are computed once, ``O(N^2 D)``; each pick then costs ``O(N)``.

    Deviations from the paper: newline vectors do not compete, and are left to the engine. Picked tokens are masked; the
    official code may pick a duplicate of one, or itself, again. Distances below 1e-6 are zero, so that float32 noise
    does not rank copies, and ties go to the lower index.
    """

    needs = (probes.Embeddings(),)
    paper = "arXiv:2503.02175"
    complexity = "O(N^2 D)"

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        distance = _distances(ranking.cosine_matrix(crops.probe(probes.Embeddings())))
        nearest = distance.amin(dim=-1)
        taken = torch.zeros_like(nearest, dtype=torch.bool)
        picks = [ranking.take_best(nearest, taken)]
        nearest = ranking.row_of(distance, picks[0])
        while len(picks) < count:
            picks.append(ranking.take_best(nearest, taken))
            nearest = torch.minimum(nearest, ranking.row_of(distance, picks[-1]))
        return torch.cat(picks, dim=1)


def _distances(similarity: Tensor) -> Tensor:
    """Turn cosines ``[B, N, N]`` into distances, in place; the distance of a token to itself is infinite."""
    few = max(1, _AT_ONCE // similarity.shape[2])
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    parts = [slice(start, start + few) for start in range(0, similarity.shape[1], few)]
    for part in parts:
        rows = similarity[:, part]
        rows.copy_((1 - rows).masked_fill(rows > 1 - ranking.RESOLUTION, 0.0))
    # Products of matrices are not exactly symmetric, yet the two tokens of a closest pair have to tie.
    for part in parts:
        similarity[:, part] = torch.minimum(similarity[:, part], similarity[:, :, part].mT)
    return similarity
