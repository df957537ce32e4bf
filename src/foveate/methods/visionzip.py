"""VisionZip: the tokens that the encoder attends to, and a few that sum up the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.author import CropBatch, CropMerger, FoveateError, Groups, probes, ranking, register

SEEN, KEYS = probes.Attention(), probes.Keys()


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(CropMerger):
    """VisionZip (arXiv 2412.04467, CVPR 2025): dominant and contextual tokens, merged before the projector.

    Of T tokens, ``c = max(1, round(T * contextual_ratio))`` are contextual, the others dominant. Dominant are the
    ``[CLS]`` token and the patches with the most ``[CLS]`` attention. Every ``R // c``-th of the R remaining patches,
    in raster order, is the anchor of a contextual token; each other one joins the anchor with the most similar key
    (cosine, mean over heads). Works on each crop by itself.

    Parameters
    ----------
    keep
        The budget T, in which the ``[CLS]`` token counts.
    contextual_ratio
        Share of contextual tokens; 0 merges nothing. The published budget of 64 is 54 + 10.
    merge
        ``"add"``: the anchor plus the mean of its members, as in the official code; about twice the norm of a token.
        ``"mean"``: the mean of the anchor and its members, as the paper's text says.

    Notes
    -----
    Reads one attention row and the keys of one layer; the assignment is a product of ``(R, c)`` by the width of a head.

    Deviations from the paper: the ``[CLS]`` token goes first, and then all tokens in raster order, each contextual one
    at its anchor, where the official code puts the contextual ones last. To make room for ``[CLS]``, the anchors that
    fill the first places move on by one. A single token is not contextual but dominant. Encoders without
    ``[CLS]`` (and joint budgets, where crops have no single one) rank by the attention that each token receives and
    have only patches among the dominant tokens. The share of contextual tokens at budgets other than 64 is UNVERIFIED.
    """

    contextual_ratio: float = 10 / 64
    merge: Literal["add", "mean"] = "add"

    needs = (SEEN, KEYS, probes.ClsToken())
    merges = "features"
    paper = "arXiv:2412.04467"
    complexity = "O(N log N + N T d)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_contextual_ratio(self.contextual_ratio)

    def pick(self, crops: CropBatch, count: int) -> Groups:
        return dominant_and_contextual(crops, count, contextual_count(count, self.contextual_ratio), self.merge)


def check_contextual_ratio(contextual_ratio: float) -> None:
    """Raise `FoveateError` unless the share of contextual tokens is valid."""
    if not 0.0 <= contextual_ratio <= 1.0:
        raise FoveateError(f"contextual_ratio is a share from 0 to 1, not {contextual_ratio!r}")


def contextual_count(count: int, ratio: float) -> int:
    """Return how many of `count` tokens are contextual: at least one unless the ratio is 0, and never all of them."""
    return min(max(1, round(count * ratio)), count - 1) if ratio else 0


def dominant_and_contextual(
    crops: CropBatch,
    count: int,
    contextual: int,
    merge: Literal["add", "mean"] = "add",
    attention: probes.Probe = SEEN,
    keys: probes.Probe = KEYS,
) -> Groups:
    """Keep the tokens with the most attention and `contextual` sums of the others, `count` in all.

    Parameters
    ----------
    crops
        With the probes `attention` ``[B, N]``, `keys` ``[B, N, d]``, and maybe ``[CLS]``, which is dominant.
    """
    front = int(crops.cls is not None)
    order, dominant = ranking.descending(crops.probe(attention)), count - contextual - front
    chosen, rest = (part.sort(dim=1).values for part in (order[:, :dominant], order[:, dominant:]))
    step = rest.shape[1] // max(1, contextual)
    anchors = rest[:, : step * contextual : step]
    places, by_place = torch.cat([chosen, anchors], dim=1).sort(dim=1)
    rank = by_place.argsort(dim=1) + front
    first = torch.arange(front, device=order.device).expand(len(order), -1)
    kept = torch.cat([first, ranking.make_room(places, crops.size, front)], dim=1)
    own = torch.ones(len(order), front + dominant, device=order.device)
    if not contextual:
        return Groups(kept, torch.cat([first, rank], dim=1), torch.cat([first + crops.size, chosen], dim=1), own)
    group, weight = _contextual(crops.probe(keys), rest, contextual, step, merge)
    return Groups(
        kept,
        torch.cat([first, rank[:, :dominant], rank[:, dominant:].gather(1, group)], dim=1),
        torch.cat([first + crops.size, chosen, rest], dim=1),
        torch.cat([own, weight], dim=1),
    )


def _contextual(keys: Tensor, rest: Tensor, count: int, step: int, merge: str) -> tuple[Tensor, Tensor]:
    """Assign the tokens `rest` ``[B, R]`` to every `step`-th of them: number of the group and weight, ``[B, R]``."""
    number = torch.arange(rest.shape[1], device=rest.device)
    keys = keys.take_along_dim(rest[..., None], dim=1)
    closest = ranking.cosine_matrix(keys, keys[:, : step * count : step]).argmax(dim=-1)
    is_anchor = (number % step == 0) & (number < step * count)
    group = torch.where(is_anchor, number // step, closest)
    members = torch.zeros(len(rest), count, device=rest.device)
    members = members.scatter_add(1, group, (~is_anchor).float().expand(len(rest), -1)).gather(1, group)
    if merge == "mean":
        return group, 1 / (1 + members)
    return group, torch.where(is_anchor, 1.0, 1 / members.clamp(min=1))
