"""Merges, put together: several one after the other, and several side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.selection import Merge, SpanSelection


def joined(first: Merge, second: Merge) -> Merge:
    """Return the merge with the entries of both."""
    return Merge(
        torch.cat([first.target, second.target]),
        torch.cat([first.source, second.source]),
        torch.cat([first.weight, second.weight]),
    )


def composed(earlier: Merge | None, places: Tensor, chosen: SpanSelection) -> Merge | None:
    """Return how tokens flow through one merge and then a selection of what it left.

    Parameters
    ----------
    earlier
        How the n tokens flowed into R of them; `None` if these were taken as they are.
    places
        ``[R]`` int64: which of the n they are.
    chosen
        What is left of the R.

    Returns
    -------
    Merge or None
        From the n tokens into those of `chosen`; `None` if nothing has merged.
    """
    if chosen.merge is None and earlier is None:
        return None
    device = places.device
    rank = torch.arange(len(chosen), device=device)
    later = chosen.merge or Merge(rank, chosen.kept.to(device), torch.ones(len(chosen), device=device))
    target, source, weight = later.target.to(device), later.source.to(device), later.weight.to(device)
    if earlier is None:
        return Merge(target, places.index_select(0, source), weight)
    # Each entry that takes from a token is replaced by the entries that flowed into this token.
    entry, before = (source[:, None] == earlier.target.to(device)[None]).nonzero(as_tuple=True)
    return Merge(target[entry], earlier.source.to(device)[before], weight[entry] * earlier.weight.to(device)[before])
