"""Crops side by side: what the author of a method gets of them, and what is taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import ContractError, InputError
from foveate.core.probes import Probe


@dataclass(frozen=True, eq=False)
class CropBatch:
    """Crops of the same number of tokens that get the same budget, stacked.

    Attributes
    ----------
    grid
        Rows and columns, or `None` if the tokens do not fill a rectangle.
    ordinals
        Which crop of its prompt each one is, ``len == B``: the same whatever batch the prompt travels in.
    size
        Number of tokens per crop, N.
    device
        Where `probe` tensors live. They are for reading: those of a single crop are what the model goes on with.
    cls
        The row that stands for the crop's ``[CLS]`` token in a merge, which is N, or `None` if there is none: the
        method has to ask for `ClsToken`, the encoder to have one, and the budget not to be joint.
    query
        ``[B, M, D]``: input embeddings of the prompt's text, if the method asked for `Query`; M may be zero.
    """

    grid: tuple[int, int] | None
    ordinals: tuple[int, ...]
    size: int
    device: torch.device
    planes: dict[Probe, Tensor]
    cls: int | None = None
    query: Tensor | None = None

    def probe(self, probe: Probe) -> Tensor:
        """Return a probe's values, ``[B, N, ...]``.

        Raises
        ------
        ContractError
            If the method has not asked for it.
        """
        if probe not in self.planes:
            raise ContractError(f"reads {probe!r}, which was not collected: list it in needs")
        return self.planes[probe]

    def require_grid(self, method: str) -> tuple[int, int]:
        """Return the grid, or raise if the tokens form none: thinned out before, or of several crops at once."""
        if self.grid is None:
            raise InputError(
                f"{method} needs the whole token grid of a crop: put it first in the chain, use a budget per 'image' "
                "or per 'crop', and a model whose family knows the grid"
            )
        return self.grid


@dataclass(frozen=True, eq=False)
class Groups:
    """How the crops of a `CropBatch` are merged: ``out[b, target] = sum(weight * x[b, source])`` over the entries.

    Attributes
    ----------
    kept
        ``[B, T]`` int64 distinct: the token whose place each merged one takes, in any order.
    target
        ``[B, M]`` int64: index into the T merged tokens.
    source
        ``[B, M]`` int64: a token of the crop, or `CropBatch.cls`.
    weight
        ``[B, M]`` float32.
    wanted
        ``[B, T]`` bool: the merged tokens that a crop ends up with, if their number depends on the image; `None`
        stands for all.
    """

    kept: Tensor
    target: Tensor
    source: Tensor
    weight: Tensor
    wanted: Tensor | None = None

    def per_crop(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return what each crop is left with: places, targets, sources and weights.

        Waits for the device once if there are unwanted tokens: the number of the others decides all later shapes.
        """
        rows = list(zip(self.kept, self.target, self.source, self.weight, strict=True))
        if self.wanted is None:
            return rows
        rank = self.wanted.cumsum(dim=1) - 1
        flags = torch.cat([self.wanted, self.wanted.gather(1, self.target)], dim=1).cpu()
        masks = zip(*torch.split(flags, [self.kept.shape[1], self.target.shape[1]], dim=1), strict=True)
        return [
            (kept[stays], number[target[flows]], source[flows], weight[flows])
            for (kept, target, source, weight), (stays, flows), number in zip(rows, masks, rank, strict=True)
        ]


def picked(value: Any, crops: CropBatch, count: int) -> Tensor:
    """Return what `pick` chose in some crops, ``[B, T]`` int64.

    Raises
    ------
    ContractError
        If it is of another kind or shape, such as a mask ``[B, N]`` or scores.
    """
    due = (len(crops.ordinals), count)
    if not isinstance(value, Tensor) or value.dtype != torch.long or value.shape != due:
        what = f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ContractError(
            f"pick returns {what}, where indices {list(due)} of torch.int64 are due: the {count} of {crops.size} "
            "tokens that stay of each crop, such as ranking.top(scores, count)"
        )
    return value


def grouped(value: Any, crops: CropBatch, count: int) -> Groups:
    """Return how `pick` merges some crops.

    Raises
    ------
    ContractError
        If that is no `Groups`, or its parts do not fit together.
    """
    if not isinstance(value, Groups):
        raise ContractError(f"pick returns a {type(value).__name__}, where Groups(kept, target, source, weight) is due")
    if torch.compiler.is_compiling():  # to which the number of entries may be unknown
        return value
    batch = len(crops.ordinals)
    entries = [value.target, value.source, value.weight]
    shapes = {(batch, int(x.shape[-1])) for x in entries}
    fits = value.kept.shape[:1] == (batch,) and all(x.dim() == 2 and x.shape[0] == batch for x in entries)
    whole = all(x.dtype == torch.long for x in (value.kept, value.target, value.source))
    # Where crops end up with different numbers, there may be places to spare.
    if not fits or len(shapes) != 1 or not whole or (value.wanted is None and value.kept.shape[1] != count):
        found = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (value.kept, *entries))
        raise ContractError(
            f"pick merges by kept, target, source and weight of {found}, where [{batch}, {count}] and three times "
            f"[{batch}, M] are due, all but the weights of torch.int64"
        )
    return value
