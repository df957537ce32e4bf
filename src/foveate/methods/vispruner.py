"""VisPruner: the tokens that the encoder attends to, plus diverse ones among the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register

PUBLISHED_STEP, PUBLISHED_SIZE, ROUNDS = 8, 1024, 64
"""Tokens that a round drops, up to how many tokens the paper and its ports have that, and rounds from 576 to 64."""

_COPIED = 2**19  # cosines at once


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(CropReducer):
    """VisPruner (arXiv 2412.01818 v2, ICCV 2025): training-free and independent of the question.

    Of T tokens, ``floor(T * important_ratio)`` are those with the most ``[CLS]`` attention in the layer that makes
    the features. The others come from thinning out the rest: in rounds, the list is split by the parity of its rank,
    each even token is scored by its closest odd one, and those with the closest copies are dropped. Works on each
    crop by itself.

    Parameters
    ----------
    keep
        The budget T.
    important_ratio
        Share of the tokens chosen by attention. With 1 this is FasterVLM; with 0, or where ``T * important_ratio``
        is below one, even the most salient token may go.
    step
        Tokens dropped per round. ``"auto"``: 8, as published, of up to 1,024 tokens; of more, as many as it takes to be
        done in 64 rounds, which is how many 576 tokens take to become 64, and no less than 8. `None` drops all even
        tokens that may go, which halves the list each round.
    order
        ``"similarity"``: survivors are listed by their similarity before the odd tokens, as published; that makes
        later rounds sensitive to noise. ``"rank"``: the list keeps its attention order, which is better conditioned.

    Notes
    -----
    Cosine similarities are computed once, ``O(N^2 C)``; the rounds, about ``(N - T) / step`` of them, only read them.

    Deviations from the paper: of more than 1,024 tokens, rounds drop more than 8 (`step`). Of 256 kept of 2,304 random
    tokens, 67 % are then those of rounds of 8, which themselves keep 71 % if features change by 1e-7; they lie as far
    apart. Encoders without ``[CLS]`` use the attention that each token receives, as the authors
    advise. It is that of the layer that makes the features; last-layer attention with penultimate features, as the
    official code has for SigLIP, is not offered. On LLaVA-NeXT the official code leaves the picture padded: a crop's
    budget goes to all its patches, those that show padding too, where here they are no candidates, as the model itself
    cuts them off. Newline vectors are dropped there, and here by default (`separators`). Where the official code fails
    (an odd number of residual tokens, fewer than `step` even ones), the even half is the larger and a round drops at
    most all of it. Cosines and their order are those of float64: in float32 the order in which a kernel adds decides
    much of the diverse half. Sorting is stable, ties (up to 1e-10) go to the one listed first.
    """

    important_ratio: float = 0.5
    step: int | Literal["auto"] | None = "auto"
    order: Literal["similarity", "rank"] = "similarity"

    paper = "arXiv:2412.01818"
    complexity = "O(N^2 C + rounds N^2)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.important_ratio <= 1.0:
            raise FoveateError(f"important_ratio is a share from 0 to 1, not {self.important_ratio}")
        if isinstance(self.step, int) and self.step < 1:
            raise FoveateError(f"a round drops at least one token: step={self.step} is not possible, use 8 or None")

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        attention = probes.Attention()
        return (attention,) if self.important_ratio == 1 else (probes.Features(), attention)

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        # Truncation in double precision, as the official code has it: 100 * 0.29 gives 28.
        important = int(count * self.important_ratio)
        order = ranking.descending(crops.probe(probes.Attention()))
        chosen, rest = order[:, :important], order[:, important:]
        if important == count:
            return chosen
        features = crops.probe(probes.Features())
        similarity = ranking.cosine_matrix(features, dtype=torch.float64, among=rest)
        survivors = self._thin_out(similarity, count - important, self.per_round(crops.size, count))
        return torch.cat([chosen, rest.gather(1, survivors)], dim=1)

    def per_round(self, size: int, count: int) -> int:
        """Return how many tokens a round drops at most, on the way from `size` to `count`."""
        if self.step != "auto":
            return self.step or size
        return PUBLISHED_STEP if size <= PUBLISHED_SIZE else max(PUBLISHED_STEP, -((count - size) // ROUNDS))

    def _thin_out(self, similarity: Tensor, count: int, step: int) -> Tensor:
        """Drop near-duplicates from R tokens, given ``[B, R, R]``, until `count` are left; shapes follow from R."""
        batch, size = similarity.shape[:2]
        rows, first = similarity.flatten(0, 1), torch.arange(batch, device=similarity.device)[:, None] * size
        rest = torch.arange(size, device=similarity.device).expand(batch, -1)
        while (surplus := rest.shape[1] - count) > 0:
            even, odd = rest[:, 0::2], rest[:, 1::2]
            # Whole rows are copied far faster than the pairs are picked out of them, a few that fit a cache at once.
            parts = [
                rows.index_select(0, part.flatten()).view(batch, -1, size).amax(dim=1)
                for part in torch.split(first + odd, max(1, _COPIED // size), dim=1)
            ]
            closest = torch.stack(parts).amax(dim=0).gather(1, even)
            drop = min(surplus, even.shape[1], step)
            survivors = ranking.descending(ranking.without_noise(closest))[:, drop:]
            if self.order == "similarity":
                rest = torch.cat([even.gather(1, survivors), odd], dim=1)
            else:
                ranks = torch.arange(1, rest.shape[1], 2, device=rest.device).expand(batch, -1)
                rest = rest.gather(1, torch.cat([2 * survivors, ranks], dim=1).sort(dim=1).values)
        return rest
