"""LLaVA-PruMerge and PruMerge+: salient tokens that take in what has similar keys."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from foveate.author import CropBatch, CropMerger, FoveateError, Groups, probes, ranking, register

PRESETS = ((64 / 576, 13 / 64), (128 / 576, 40 / 128), (256 / 576, 95 / 256))
"""Published settings of PruMerge+: the share of the tokens that is kept, and that of the salient among the kept."""


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(CropMerger):
    """LLaVA-PruMerge (arXiv 2403.15388, ICCV 2025): salient tokens plus the sum of all others, before the projector.

    Of T tokens, T - 1 are centres, those with the most ``[CLS]`` attention. To each centre the `neighbours` tokens
    with the most similar keys are added, kept or not, each weighted by its attention. The last token is the sum of all
    that are no centres, weighted in the same way. Works on each crop by itself.

    Parameters
    ----------
    keep
        The budget T.
    neighbours
        Tokens that flow into each centre, at most all others.
    adaptive
        Centres are the outliers of the attention, those above ``Q3 + 1.5 * (Q3 - Q1)``, as in the paper: how many
        depends on the image, and `keep` is the upper bound. Waits for the device once per batch, and so does not
        compile to one graph.
    layer
        Encoder layer of attention and keys, counted as in `LayerProbe`: 0, the layer behind the one that makes the
        features, as published for CLIP; -1, the one that makes them, which suits encoders whose last layer was never
        trained to be read.

    Notes
    -----
    All heads of a layer are taken as one, as in the official code. Costs a product of ``(T, N)`` by the width of the
    encoder.

    Deviations from the paper: a budget instead of a count that depends on the image, unless `adaptive`. Quartiles are
    those of each crop; of the whole batch, as in the official code, they are not offered, as a crop would depend on its
    batch. At least one token is a centre; a budget of 1 is a centre without the sum of
    the others. Tokens are in raster order, the sum last, where the official code lists them by attention; centres that
    fill the last places move ahead by one. Encoders without ``[CLS]`` use the attention that each token receives, and
    those whose last layer makes the features have no layer behind it and are read there.
    Weights of attention that is no number are zero.
    """

    neighbours: int = 32
    adaptive: bool = False
    layer: int = 0

    merges = "features"
    paper = "arXiv:2403.15388"
    complexity = "O(N T (C + log N))"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1:
            raise FoveateError(f"a centre takes in at least one neighbour: neighbours={self.neighbours} is too few")
        if self.layer > 0:
            raise FoveateError(
                f"layers are counted back from 0, the one behind the features: layer={self.layer} is not"
            )

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return probes.Attention(joint=True, layers=(self.layer,)), probes.Keys(joint=True, layers=(self.layer,))

    def pick(self, crops: CropBatch, count: int) -> Groups:
        attention, keys = (crops.probe(probe) for probe in self.needs)
        attention = attention.float().nan_to_num()
        centres, back = max(1, count - 1), int(count > 1)
        if not self.adaptive:
            chosen = self._centres(attention, centres)
            return _merged(attention, keys, chosen, None, self.neighbours, back)
        wanted = self._wanted(attention)
        chosen = ranking.top(torch.where(wanted, attention, -torch.inf), centres)
        return _merged(attention, keys, chosen, wanted.gather(1, chosen), self.neighbours, back)

    def _centres(self, attention: Tensor, count: int) -> Tensor:
        """Return `count` centres ``[B, count]``, ascending."""
        return ranking.top(attention, count)

    def _wanted(self, attention: Tensor) -> Tensor:
        """Mark the centres that the image asks for, ``[B, N]``."""
        quartiles = attention.quantile(torch.tensor([0.25, 0.75], device=attention.device), dim=1)[..., None]
        outliers = attention > quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
        return outliers.scatter(1, ranking.descending(attention)[:, :1], True)


@register("prumerge+")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+ (arXiv 2403.15388, ICCV 2025): `PruMerge` with centres on a uniform grid beside the salient ones.

    Of the T - 1 centres, the salient are the share that the published settings have (13 of 64, 40 of 128, 95 of 256 at
    576 tokens; interpolated in between, UNVERIFIED there). The others are spread evenly over the remaining tokens.

    Parameters
    ----------
    keep
        The budget T.
    neighbours
        See `PruMerge`.
    adaptive
        The salient are the m outliers, and the grid has every ``N // m // 3``-th token but the last, as published.
        Where that makes more centres than the budget allows, those with the most attention stay.
    layer
        See `PruMerge`.

    Notes
    -----
    Deviations from the paper: those of `PruMerge`. With more outliers than a third of the tokens, where the official
    code fails, every token but the last is on the grid.
    """

    def _centres(self, attention: Tensor, count: int) -> Tensor:
        order, size = ranking.descending(attention), attention.shape[1]
        salient = min(_salient(count + 1, size), count)
        rest, spread = order[:, salient:].sort(dim=1).values, count - salient
        even = torch.arange(spread, device=order.device) * rest.shape[1] // max(1, spread)
        return torch.cat([order[:, :salient], rest[:, even]], dim=1).sort(dim=1).values

    def _wanted(self, attention: Tensor) -> Tensor:
        outliers, size = super()._wanted(attention), attention.shape[1]
        stride = (size // outliers.sum(dim=1, keepdim=True) // 3).clamp(min=1)
        place = torch.arange(size, device=attention.device)
        return outliers | ((place % stride == 0) & (place < size - 1))


def _salient(count: int, size: int) -> int:
    """Return how many of `count` tokens, kept of `size`, PruMerge+ chooses by attention."""
    share = min(max(count / size, PRESETS[0][0]), PRESETS[-1][0])
    (x, low), (z, high) = next(pair for pair in pairwise(PRESETS) if share <= pair[1][0])
    return max(1, round(count * (low + (high - low) * (share - x) / (z - x))))


def _merged(
    attention: Tensor, keys: Tensor, centres: Tensor, wanted: Tensor | None, neighbours: int, back: int
) -> Groups:
    """Add to each of the centres ``[B, K]`` its neighbours, and with `back` append the sum of all that are none."""
    (batch, count), size = centres.shape, attention.shape[1]
    similarity = ranking.cosine_matrix(keys.take_along_dim(centres[..., None], dim=1), keys).nan_to_num(nan=-2.0)
    near = ranking.descending(similarity.scatter(2, centres[..., None], -torch.inf))[..., : min(neighbours, size - 1)]
    place, rank = torch.arange(size, device=centres.device), torch.arange(count, device=centres.device)
    is_centre = torch.ones_like(centres, dtype=torch.bool) if wanted is None else wanted
    inside = torch.zeros_like(attention, dtype=torch.bool).scatter(1, centres, is_centre)
    last = torch.ones(batch, back, dtype=torch.bool, device=centres.device)
    own, into = torch.ones_like(centres, dtype=torch.float32), rank.repeat_interleave(near.shape[2])
    target, source, weight = [rank, into], [centres, near.flatten(1)], [own, attention.gather(1, near.flatten(1))]
    if back:
        target.append(torch.full_like(place, count))
        source.append(place.expand(batch, -1))
        weight.append(attention.masked_fill(inside, 0.0))
    return Groups(
        torch.cat([ranking.make_room(centres, size, back=back), last.long() * (size - 1)], dim=1),
        torch.cat(target).expand(batch, -1),
        torch.cat(source, dim=1),
        torch.cat(weight, dim=1),
        None if wanted is None else torch.cat([wanted, last], dim=1),
    )
