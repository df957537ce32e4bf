"""EVS: the tokens of a video that changed since the frame before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import (
    Budget,
    BudgetError,
    InputError,
    Reducer,
    Selection,
    Span,
    VisualTokens,
    budget,
    probes,
    ranking,
    register,
)

_FIRST_FRAME = 255.0
_STEPS = 1e6  # per unit of dissimilarity


@register("evs")
@dataclass(frozen=True)
class EVS(Reducer):
    """Efficient Video Sampling (arXiv 2510.14624): drops the tokens that repeat the frame before.

    A token's news is one minus the cosine similarity between its embedding and the one at the same place of the frame
    before. The first frame stays whole, and of the others the tokens with the most news, wherever in the video they
    are: a frame may end up with no token. Images are left alone.

    Parameters
    ----------
    keep
        The budget of a whole video. A ratio is one minus the pruning rate q, and is counted as published:
        ``int(t * h * w * (1 - q))`` in double precision, so that 0.1 of 100 tokens are 9. Never less than one frame.

    Raises
    ------
    BudgetError
        If the budget is adaptive: here the number of tokens has to be known before a video is encoded.

    Notes
    -----
    ``O(N D)`` for the similarities and one sort per video. A frame is compared with the one before it as it was, so
    that slow drift goes unseen.

    Deviations from the paper: UNVERIFIED against the paper itself; this is the rule of a published serving engine.
    Cosines are computed in float32 and rounded to 1e-6 before the sort, so that equal tokens tie whatever the device;
    ties go to the earlier token.
    """

    needs = (probes.Embeddings(),)
    video_only = True
    paper = "arXiv:2510.14624"
    complexity = "O(N D + N log N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coverages():
            raise BudgetError("evs needs a budget that is known before a video is encoded: use a count or a ratio")

    def keeps_all(self, spans: Sequence[Span]) -> bool:
        return all(self.count(span) == sum(map(len, span.crops)) for span in spans)

    def select(self, tokens: VisualTokens) -> Selection:
        embeddings, first = tokens.probe(probes.Embeddings()), 0
        kept: dict[int, list[Tensor]] = {}
        work: dict[tuple[int, int, int], list[tuple[int, Tensor]]] = defaultdict(list)
        for i, span in enumerate(tokens.spans):
            frames = embeddings[first : first + len(span.crops)]
            first += len(span.crops)
            count = self.count(span)
            if count < sum(map(len, span.crops)):
                work[len(frames), len(span.crops[0]), count].append((i, torch.stack(frames)))
            kept[i] = [crop.index.to(tokens.device, non_blocking=True) for crop in span.crops]
        for (_, _, count), videos in work.items():
            rows = self.pick(torch.stack([video for _, video in videos]), count)
            for (i, _), row in zip(videos, rows, strict=True):
                kept[i] = [torch.cat(kept[i]).index_select(0, row)]
        return tokens.selection(kept)

    def pick(self, videos: Tensor, count: int) -> Tensor:
        """Return the kept tokens ``[V, count]`` of videos ``[V, t, n, D]``, as indices into the ``t * n`` tokens."""
        unit = torch.nn.functional.normalize(videos.float(), dim=-1)
        news = 1 - (unit[:, 1:] * unit[:, :-1]).sum(dim=-1)
        news = torch.cat([torch.full_like(unit[:, :1, :, 0], _FIRST_FRAME), news], dim=1)
        return ranking.descending((news * _STEPS).round().flatten(1))[:, :count]

    def count(self, span: Span) -> int:
        sizes = [len(crop) for crop in span.crops]
        total = sum(sizes)
        if span.kind != "video":
            return total
        own = budget.resolve(self.keep, span.kind, span.ordinal)
        count = _by_ratio(total, own) if isinstance(own.value, float) else sum(span.budget(self.keep))
        count = min(max(sizes[0], count), total)
        if count < total and (len({crop.grid for crop in span.crops}) > 1 or span.crops[0].grid is None):
            raise InputError("evs compares whole frames of equal grids place by place: put it first in the chain")
        return count


def _by_ratio(total: int, budget: Budget) -> int:
    rate = round(1 - budget.value, 12)  # 1 - 0.18 is not quite the rate 0.82 that was meant
    return int(total * (1 - rate))
