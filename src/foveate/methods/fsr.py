"""FSR: focus on what the question asks for, scan for what else there is, refine by merging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropMerger, FoveateError, Groups, probes, ranking, register


@register("fsr")
@dataclass(frozen=True)
class FSR(CropMerger):
    """FSR, Focus-Scan-Refine (arXiv 2602.05809): evidence for the question, then context, which absorbs its like.

    The score of a token is its relevance to the question, cubed, times its ``[CLS]`` attention ``[N]``, both brought to
    0..1 in each crop. Focus: the fewest tokens of highest score that hold a share of the sum of scores, at least 1 and
    at most T. Scan: each further token is the one least similar, by cosines of embeddings ``[N, D]``, to its nearest
    among those picked. Refine: with S scanned tokens, the S dropped tokens nearest to one of them are merged into it;
    a mean with weight 1 for the scanned token and the cosine, at least 0, for the others.

    Parameters
    ----------
    keep
        The budget T.
    focus
        Share of the sum of scores that the focus holds, in (0, 1].

    Notes
    -----
    Cosines of all pairs of embeddings are computed once, ``O(N^2 D)``, and take most of the time.

    Deviations from the paper: its code is not released, and its description was read in part. The share of 0.9, that
    the focus ends at T, and the count and the weights of the refinement are UNVERIFIED. So is the relevance, which the
    paper takes from CLIP's text tower, absent from the checkpoint of a VLM: here it is the mean cosine between a
    token's embedding and the input embeddings of the prompt's text ``[M, D]``, which is that behind the first image: a
    question before it is not read if any token, such as those that end a chat template, follows. It is 1 everywhere
    without text (M = 0) or differences. Encoders without ``[CLS]`` use the attention that each token receives.
    """

    focus: float = 0.9

    needs = (probes.Embeddings(), probes.Attention(), probes.Query())
    merges = "embeddings"
    paper = "arXiv:2602.05809"
    complexity = "O(N^2 D + N M D + T N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.focus <= 1.0:
            raise FoveateError(f"focus is a share of the scores, above 0 and up to 1, not {self.focus}")

    def pick(self, crops: CropBatch, count: int) -> Groups:
        embeddings, query = crops.probe(probes.Embeddings()), crops.query
        similarity = ranking.cosine_matrix(embeddings)
        score = ranking.min_max(crops.probe(probes.Attention()))
        if query is not None and query.shape[1] > 0:
            score = score * ranking.min_max(ranking.cosine_matrix(embeddings, query).mean(dim=-1)) ** 3

        order = ranking.descending(score)
        mass = score.gather(1, order).double().cumsum(dim=1)
        focused = 1 + (mass < self.focus * mass[:, -1:]).sum(dim=1, keepdim=True).clamp(max=count - 1)
        kept = _scan(similarity, order, focused, count)
        return _refine(similarity, kept, focused)


def _scan(similarity: Tensor, order: Tensor, focused: Tensor, count: int) -> Tensor:
    """Return the first ``focused[b]`` tokens of an order ``[B, N]``, and then the furthest ones: ``[B, count]``."""
    taken = torch.zeros_like(order, dtype=torch.bool)
    closest = torch.full_like(similarity[:, 0], -torch.inf)
    picks: list[Tensor] = []
    for t in range(count):
        # Tokens in focus come before all others, in their order: no cosine is below -1.
        in_focus = torch.zeros_like(closest).scatter(1, order[:, t : t + 1], 4.0) * (focused > t)
        picks.append(ranking.take_best(in_focus - closest.clamp(min=-1.0), taken))
        closest = torch.maximum(closest, ranking.row_of(similarity, picks[-1]))
    return torch.cat(picks, dim=1)


def _refine(similarity: Tensor, kept: Tensor, focused: Tensor) -> Groups:
    """Merge dropped tokens into the tokens ``[B, T]`` that were scanned, those behind the first ``focused[b]``."""
    size, count = similarity.shape[1], kept.shape[1]
    rank = torch.arange(count, device=kept.device)
    scanned = rank >= focused
    is_kept = torch.zeros_like(similarity[:, 0], dtype=torch.bool).scatter(1, kept, True)
    to_kept = similarity.take_along_dim(kept[:, None], dim=2).masked_fill(~scanned[:, None], -torch.inf)
    nearness, nearest = to_kept.max(dim=2)
    absorbed = ranking.descending(nearness.masked_fill(is_kept, -torch.inf)).argsort(dim=1) < scanned.sum(
        dim=1, keepdim=True
    )
    absorbed = absorbed & ~is_kept

    own = torch.zeros_like(nearest).scatter(1, kept, rank.expand_as(kept))
    target = torch.where(absorbed, nearest, own)
    weight = torch.where(absorbed, nearness.clamp(min=0.0), is_kept.float())
    total = torch.zeros_like(weight[:, :count]).scatter_add(1, target, weight)
    source = torch.arange(size, device=kept.device).expand_as(target)
    return Groups(kept, target, source, weight / total.gather(1, target))
