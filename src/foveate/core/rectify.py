"""What kept tokens stand for: how many tokens each one represents, and what the LLM is told about it.

Pruning takes the logits of dropped tokens out of the softmax, so that a picture gets less attention than it had. A bias
on the logits of each kept token gives it back (`bias`), and its embedding may become the mean of what it represents
(`absorbed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.core.ambient import neutral
from foveate.core.ranking import RESOLUTION
from foveate.core.selection import Merge, Selection, SpanSelection
from foveate.core.spans import Crop, Span

GUARD = 1.5
"""How far above the mean a bias may be: what an image drops of its background may be at home in a single token."""
_ROWS = 1024  # compared at once, so that no matrix of all tokens with all is built
_LEAST = 1e-3


@dataclass(frozen=True, eq=False)
class Group:
    """Tokens that find their homes among each other: those of a crop.

    Attributes
    ----------
    members
        ``[n]`` int64: positions among the N tokens.
    kept
        ``[t]`` int64: ranks among the K kept tokens.
    """

    members: Tensor
    kept: Tensor


@dataclass(frozen=True, eq=False)
class Shares:
    """How N tokens are represented by the K kept ones.

    Attributes
    ----------
    counts
        ``[K]`` float32: how many tokens each kept one stands for.
    merged
        ``[K]`` float32: how many of these its embedding is made of already.
    home
        ``[N]`` int64: the rank of the kept token that each token is at home in.
    loose
        ``[N]`` float32: how much each token counts that is in no embedding: 1, or 0 if it is in one.
    mean
        ``[K]`` float32: how many tokens the kept ones of the same group stand for on average.
    """

    counts: Tensor
    merged: Tensor
    home: Tensor
    loose: Tensor
    mean: Tensor


@torch.no_grad()
def homes(tokens: Tensor, kept: Tensor) -> Tensor:
    """Return which kept token each token is most like, ``[N]`` int64: a rank among the T kept ones.

    Kept tokens are at home in themselves; cosines that differ by a share of at most 1e-6 tie, and go to the lower rank.

    Parameters
    ----------
    tokens
        ``[N, C]``.
    kept
        ``[T]`` int64, T from 1 on.
    """
    ranks = torch.arange(len(kept), device=kept.device)
    others = _unit(tokens.index_select(0, kept)).transpose(0, 1)
    found = []
    for rows in torch.split(tokens, _ROWS):
        cosines = _unit(rows) @ others
        best = cosines.amax(dim=1, keepdim=True)
        ties = cosines >= best - RESOLUTION * best.abs()
        found.append(torch.where(ties, ranks, len(kept)).amin(dim=1))
    return torch.cat(found).scatter(0, kept, ranks)


def _unit(rows: Tensor) -> Tensor:
    return normalize(rows.float(), dim=-1).nan_to_num()


def groups_of(crops: Sequence[Crop], length: int, kept: Tensor) -> list[Group]:
    """Return the groups of so many tokens of which the positions ``[K]`` are kept: the crops.

    Where a crop keeps nothing, as all crops competed for one budget, they are one group.
    """
    (first, *others), device = crops, kept.device
    if not others and len(first) == length:  # without waiting for the device
        return [Group(torch.arange(length, device=device), torch.arange(len(kept), device=device))]
    host = kept.cpu()
    found = [
        Group(crop.index.to(device), torch.isin(host, crop.index).nonzero().flatten().to(device)) for crop in crops
    ]
    if all(len(group.kept) for group in found if len(group.members)):
        return found
    members = torch.cat([group.members for group in found]).sort().values
    return [Group(members, torch.cat([group.kept for group in found]).sort().values)]


@torch.no_grad()
@neutral()
def shares(
    groups: Sequence[Group], chosen: SpanSelection, tokens: Tensor | None, given: Tensor | None = None
) -> Shares:
    """Work out what the kept tokens of a selection stand for.

    A token that merges into several counts for each by its weight there; one that merges into none is at home in the
    kept one of its group that it is most like.

    Parameters
    ----------
    tokens
        ``[N, C]`` embeddings; `None` where dropped tokens have none: they count for all of their group alike.
    given
        ``[N]``: how many tokens each token stands for by now; by default itself.
    """
    device, size = chosen.kept.device, len(chosen)
    given = torch.ones(chosen.length, device=device) if given is None else given
    ranks = torch.arange(size, device=device)
    merge = chosen.merge or Merge(ranks, chosen.kept, torch.ones(size, device=device))
    # [CLS] tokens, which follow the N tokens, stand for none of them.
    part = merge.weight.abs().to(device) * (merge.source < chosen.length)
    source, target = merge.source.clamp(max=chosen.length - 1), merge.target
    whole = part.new_zeros(chosen.length).index_add(0, source, part)
    part = part / whole.clamp(min=torch.finfo(torch.float32).tiny)[source] * given[source]
    merged = part.new_zeros(size).index_add(0, target, part)
    left = torch.where(whole > 0, 0.0, given)
    home = torch.zeros(chosen.length, dtype=torch.long, device=device)
    loose, mean, counts = torch.zeros_like(given), torch.ones_like(merged), merged
    for group in groups:
        own = left.index_select(0, group.members)
        if not len(group.kept):
            continue
        if tokens is None:
            extra = own.sum().expand(len(group.kept)) / len(group.kept)
            counts = counts.index_add(0, group.kept, extra)
        else:
            members = tokens.to(device).index_select(0, group.members)
            places = torch.searchsorted(group.members, chosen.kept.index_select(0, group.kept))
            at = group.kept.index_select(0, homes(members, places))
            home = home.scatter(0, group.members, at)
            loose = loose.scatter(0, group.members, own)
            counts = counts.index_add(0, at, own)
        total = given.index_select(0, group.members).sum() / len(group.kept)
        mean = mean.scatter(0, group.kept, total.expand(len(group.kept)))
    return Shares(counts, merged, home, loose, mean)


def shares_of(spans: Sequence[Span], selection: Selection, embedded: Sequence[Tensor] | None) -> tuple[Shares, ...]:
    """Return what the kept tokens of each span stand for.

    Parameters
    ----------
    embedded
        ``[N, D]`` per span, or ``[N, 1 + planes, D]`` where planes lie beside them, see `shares`.
    """
    rows = [None] * len(spans) if embedded is None else [x[:, 0] if x.dim() == 3 else x for x in embedded]
    return tuple(
        shares(groups_of(span.crops, len(span), chosen.kept), chosen, None if x is None else x.detach()[: len(span)])
        for span, chosen, x in zip(spans, selection, rows, strict=True)
    )


def bias(found: Shares, strength: float, guard: float = GUARD) -> Tensor:
    """Return what attention logits of each kept token are raised by, ``[K]`` float32: ``strength * log n``.

    At most `guard` times that of a token that stands for the mean number; separators get none.
    """
    raised = found.counts.clamp(min=_LEAST).log()
    return strength * raised.minimum(guard * found.mean.clamp(min=1.0).log())


@neutral()
def absorbed(embeds: Tensor, found: Shares, tokens: Tensor) -> Tensor:
    """Return kept embeddings ``[K, D]`` that are the means of what they stand for, scaled to their old norms.

    Parameters
    ----------
    embeds
        ``[K, D]``, or with planes beside them ``[K, 1 + planes, D]``.
    tokens
        ``[N, ...]``: the embeddings of all tokens.
    """
    own, each = embeds.float(), [-1] + [1] * (embeds.dim() - 1)
    total = own * found.merged.reshape(each)
    total = total.index_add(0, found.home, tokens.float() * found.loose.reshape(each))
    changed = (found.counts > found.merged).reshape(each)
    total = torch.where(changed, total, own)
    norm = total.norm(dim=-1, keepdim=True)
    changed = changed & (norm > 0)
    scaled = total * (own.norm(dim=-1, keepdim=True) / torch.where(changed, norm, 1.0))
    return torch.where(changed, scaled.to(embeds.dtype), embeds)
