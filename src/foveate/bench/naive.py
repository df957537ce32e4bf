"""How VisPruner is written at first: what the library's own versions are measured against."""

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
