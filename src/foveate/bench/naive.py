"""How methods are written at first: what the library's own versions are measured against."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_selection(features: Tensor, saliency: Tensor, count: int, ratio: float = 0.5, step: int = 8) -> Tensor:
    """Select as the paper's loop does, crop by crop, with the cosine similarities of each round computed anew.

    Parameters
    ----------
    features
        ``[B, N, C]``.
    saliency
        ``[B, N]``.
    count
        Tokens to keep, T.
    ratio, step
        As in `foveate.VisPruner`.

    Returns
    -------
    Tensor
        ``[B, T]`` int64, ascending.
    """
    return torch.stack([_crop(x, a, count, ratio, step) for x, a in zip(features, saliency, strict=True)])


def _crop(features: Tensor, saliency: Tensor, count: int, ratio: float, step: int) -> Tensor:
    important = int(count * ratio)
    order = saliency.float().argsort(descending=True, stable=True)
    kept, rest = order[:important], order[important:]
    if important == count:
        return kept.sort().values
    while (surplus := len(rest) - (count - important)) > 0:
        even, odd = rest[0::2], rest[1::2]
        one, other = (torch.nn.functional.normalize(features[i].float(), dim=-1) for i in (even, odd))
        closest = (one @ other.T).amax(dim=1)
        survivors = closest.argsort(descending=True, stable=True)[min(step, surplus, len(even)) :]
        rest = torch.cat([even[survivors], odd])
    return torch.cat([kept, rest]).sort().values


def plain_divprune(embeddings: Tensor, count: int) -> Tensor:
    """Select as DivPrune's loop does, which stacks the distances to all picked tokens at each pick.

    Parameters
    ----------
    embeddings
        ``[N, D]``.
    count
        Tokens to keep, T.

    Returns
    -------
    Tensor
        ``[T]`` int64, ascending.
    """
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    distance = 1 - unit @ unit.T
    picks = distance.topk(2, dim=0, largest=False).values[1].argmax()[None]
    while len(picks) < count:
        picks = torch.cat([picks, distance.index_select(0, picks).amin(dim=0).argmax()[None]])
    return picks.sort().values
