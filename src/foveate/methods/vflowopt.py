"""VFlowOpt: tokens that the most attended patches attend to, and block means of those dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropMerger, FoveateError, Groups, probes, ranking, register

JUDGES = 0.03


@dataclass(frozen=True)
class Judged(probes.LayerProbe):
    """Attention of the judges, mean over them and over heads, ``[N]`` per crop.

    Parameters
    ----------
    t
        Judges are the patches that receive more than `t` times the mean attention, at least the one that receives
        most. `None`: the 3 % that receive most, at least one. Patches that the encoder masks out neither judge nor
        count.
    """

    t: float | None = None

    def read(self, heads: probes.Heads) -> Tensor:
        got = probes.attention_received(heads.query, heads.key, heads.scaling, heads.lead, heads.mask)
        seen = torch.ones_like(got) if heads.mask is None else heads.mask.any(dim=2)[:, 0, heads.lead :].float()
        size = seen.sum(dim=1, keepdim=True)
        judges = ranking.descending(got)[:, : self._most(got.shape[1])]
        if self.t is None:
            weight = (torch.arange(judges.shape[1], device=got.device) < (JUDGES * size.double()).round()).float()
        else:
            weight = (got.gather(1, judges) > self.t * got.sum(dim=1, keepdim=True) / size).float()
        weight[:, 0] = 1.0
        weight = weight / weight.sum(dim=1, keepdim=True)
        return _weighted_rows(heads, judges + heads.lead, weight)[:, heads.lead :]

    def rows(self, length: int, lead: int) -> int:
        return length + self._most(length - lead)

    def _most(self, size: int) -> int:
        """Return the number of judges there may be: of n above t times the mean, ``n * t`` is less than N."""
        if self.t is None:
            return max(1, round(JUDGES * size))
        return size if self.t < 1 else max(1, int(size / self.t))


def _weighted_rows(heads: probes.Heads, index: Tensor, weight: Tensor, chunk: int = 64) -> Tensor:
    """Return the sum of the attention rows `index` ``[B, J]``, each times its `weight`, mean over heads ``[B, S]``."""
    transposed, parts = heads.key.float().transpose(-1, -2), []
    for rows, share in zip(torch.split(index, chunk, dim=1), torch.split(weight, chunk, dim=1), strict=True):
        rows = rows[:, None, :, None]
        logits = torch.matmul(heads.query.take_along_dim(rows, dim=2).float(), transposed) * heads.scaling
        if heads.mask is not None:
            seen = heads.mask.expand(-1, -1, heads.query.shape[2], -1).take_along_dim(rows, dim=2)
            # Not infinite: rows that padding fills have a weight of 0, and nothing to see.
            logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        parts.append(torch.bmm(share[:, None], logits.softmax(dim=-1).mean(dim=1))[:, 0])
    return torch.stack(parts).sum(dim=0)


@register("vflowopt")
@dataclass(frozen=True)
class VFlowOpt(CropMerger):
    """VFlowOpt (arXiv 2508.05211, ICCV 2025), its encoder stage: importance by judges, dropped tokens recycled.

    The patches that receive the most attention are judges; what they attend to is important. Of T tokens,
    ``M = int(N / a**2)`` are recycled, the others are the most important ones. All remaining tokens flow into the
    importance-weighted mean of their block of ``a x a`` patches, which sits at the most important of them. The stages
    inside the LLM are those of `VFlowOptAll`. Works on each crop by itself.

    Parameters
    ----------
    keep
        The budget T.
    t
        Judges receive more than `t` times the mean attention (released: 28.7 to 39.3 for LLaVA-OneVision, which means
        a handful). `None`: the 3 % that receive most.
    a
        Side of a block, a real number (released: 11.8 to 17.4 for a grid of 27 x 27). `None` recycles nothing.
    exact
        Keep exactly T: of more blocks than M the means of those with the least important leaders go, and for fewer
        the most important leftovers are added. `False` keeps a mean per block as the official code does, which may
        miss T either way. It waits for the device once per batch, and so does not compile to one graph.

    Notes
    -----
    The map costs the attention rows of all patches, in chunks, and those of the judges; no map of N x N is stored.

    Deviations from the paper: the default recycles nothing and has a share of judges, as no parameters were published
    for encoders with ``[CLS]`` (3 % is UNVERIFIED); there only patches are judges. Blocks do not reach from one tile
    into the next. The term of patch entropy, whose weight is 0 in all released settings, is left out. If no patch
    exceeds `t`, the one with the most attention is the judge. Negative importance counts as 0 in a mean, and a block of
    zeros is averaged plainly. M is at most T. A ratio r rounds to T half to even, as everywhere here, where the
    official code rounds the number ``N * (1 - r)`` of dropped ones: half a token may go the other way. A leftover that
    is added flows into the mean of its block, too.
    """

    t: float | None = None
    a: float | None = None
    exact: bool = True

    merges = "features"
    paper = "arXiv:2508.05211"
    complexity = "O(N log N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t is not None and not self.t >= 0:
            raise FoveateError(
                f"t is a multiple of the mean attention such as 30, or None for the 3 % most: not {self.t}"
            )
        if self.a is not None and not self.a > 0:
            raise FoveateError(
                f"a is the side of a block in patches such as 12, or None to recycle nothing: not {self.a}"
            )

    @property
    def reads_grid(self) -> bool:
        return self.a is not None

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return (Judged(self.t),)

    def pick(self, crops: CropBatch, count: int) -> Groups:
        importance = crops.probe(Judged(self.t)).float().nan_to_num(nan=0.0)
        if self.a is None:
            blocks, number, recycled = torch.zeros(crops.size, dtype=torch.long, device=crops.device), 1, 0
        else:
            blocks, number = _blocks(crops.require_grid(self.name), self.a, crops.device)
            recycled = min(int(crops.size / self.a**2), count)
        order, direct = ranking.descending(importance), count - recycled
        stay, source = order[:, :direct], order[:, direct:]
        block, rank = blocks[source], torch.arange(source.shape[1], device=order.device)
        # The leader of a block is its most important token: the first one in this order.
        first = torch.full((len(order), number), len(rank), device=order.device)
        first = first.scatter_reduce(1, block, rank.expand_as(block), "amin").gather(1, block)
        leads = first == rank
        exact = self.exact or self.a is None
        places = recycled if exact else min(number, len(rank))
        slot = (leads.cumsum(dim=1) - 1).gather(1, first)
        picked = (~leads).int().argsort(dim=1, stable=True)[:, :places]
        is_mean, leaders = leads.gather(1, picked), source.gather(1, picked)
        share = torch.where(slot < places, _shares(importance.gather(1, source), block, number), 0.0)
        whole = torch.ones_like(stay, dtype=torch.float32)
        kept = torch.cat([stay, leaders], dim=1)
        own = torch.arange(direct + places, device=order.device).expand_as(kept)
        return Groups(
            kept,
            torch.cat([own, torch.where(slot < places, direct + slot, 0)], dim=1),
            torch.cat([kept, source], dim=1),
            torch.cat([whole, (~is_mean).float(), share], dim=1),
            None if exact else torch.cat([whole.bool(), is_mean], dim=1),
        )


def _shares(importance: Tensor, block: Tensor, number: int) -> Tensor:
    """Return the weight ``[B, R]`` of each token in the mean of its block."""
    weight = importance.clamp(min=0)
    zeros = weight.new_zeros(len(weight), number)
    total = zeros.scatter_add(1, block, weight).gather(1, block)
    members = zeros.scatter_add(1, block, torch.ones_like(weight)).gather(1, block)
    return torch.where(total > 0, weight / total, 1 / members)


def _blocks(grid: tuple[int, int], side: float, device: torch.device) -> tuple[Tensor, int]:
    """Return which block each token of a grid is in, ``[N]``, and the number of blocks."""
    rows, columns = ([math.floor(i / side) for i in range(n)] for n in grid)
    height, width = rows[-1] + 1, columns[-1] + 1
    row, column = (torch.tensor(x).to(device, non_blocking=True) for x in (rows, columns))
    return (row[:, None] * width + column).flatten(), height * width
