"""Compaction: dropping columns from every plane of a batch of prompts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.errors import InputError
from foveate.core.selection import Selection
from foveate.core.spans import Span


@dataclass(frozen=True, eq=False)
class Compaction:
    """Which columns of the full prompts make up the compact ones.

    Attributes
    ----------
    columns
        ``[B, W]`` int64: the column of the full prompt behind each column of the compact one, or -1 for padding.
    length
        Number of columns of the full prompts, L.
    padded
        Whether any entry of `columns` is -1.
    behind
        ``[B]`` int64: the position of what follows the prompts, where positions are not counted along them (M-RoPE).
    """

    columns: Tensor
    length: int
    padded: bool
    behind: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of columns of the compact prompts, W."""
        return int(self.columns.shape[1])

    @property
    def drops_nothing(self) -> bool:
        """Whether every column is where it was."""
        return self.width == self.length and not self.padded

    def apply(self, plane: Tensor, fill: int = 0, dim: int = 1) -> Tensor:
        """Compact a plane ``[..., B, L, ...]`` whose batch dimension is ``dim - 1`` and whose columns are `dim`."""
        moved = plane.movedim(dim, -1).movedim(dim - 1, -2)  # [..., B, L]
        columns = self.columns.to(plane.device)
        index = columns.clamp(min=0).expand(*moved.shape[:-1], -1)
        out = moved.gather(-1, index)
        if self.padded:
            out = out.masked_fill(columns < 0, fill)
        return out.movedim(-2, dim - 1).movedim(-1, dim)

    def then(self, extra: int) -> Compaction:
        """Return the compaction of prompts with `extra` further columns, all of them kept."""
        more = torch.arange(self.length, self.length + extra, device=self.columns.device)
        columns = torch.cat([self.columns, more.expand(len(self.columns), -1)], dim=1)
        behind = None if self.behind is None else self.behind + extra
        return Compaction(columns, self.length + extra, self.padded, behind)

    def followed_by(self, other: Compaction) -> Compaction:
        """Return the compaction of prompts made of this one's columns and then the other's, which ends them."""
        tail = torch.where(other.columns < 0, -1, other.columns + self.length)
        columns = torch.cat([self.columns, tail.to(self.columns.device)], dim=1)
        return Compaction(columns, self.length + other.length, self.padded or other.padded, other.behind)

    def cropped(self, width: int) -> Compaction:
        """Return the compaction of prompts of which a cache has only the first columns left, `width` of the W.

        Raises
        ------
        InputError
            If it is not clear where the prompts go on: they end differently, or, with `behind`, in front of an image.
        """
        length = int(self.columns[0, width - 1]) + 1
        ends, text = self.columns[:, width - 1], self.length - length == self.width - width
        if bool((ends != length - 1).any()) or (self.behind is not None and not text):
            raise InputError("this cache was cropped to where an image is or was: start with a new cache")
        behind = None if self.behind is None else self.behind - (self.width - width)
        return Compaction(self.columns[:, :width], length, self.padded, behind)

    def expanded(self, batch: int) -> Compaction:
        """Return the compaction for a batch in which each prompt stands several times in a row."""
        times = repeats(len(self.columns), batch)
        if times == 1:
            return self
        behind = None if self.behind is None else self.behind.repeat_interleave(times)
        columns = self.columns.repeat_interleave(times, dim=0)
        return Compaction(columns, self.length, self.padded, behind)


def sources(columns: Tensor, length: int) -> Tensor:
    """Return which of W columns that are left stands at each of those that there were, ``[B, length]``.

    Where one was dropped, it is the last one before it that is left, from which the text behind is predicted; in front
    of the first one that is left it is none, -1.

    Parameters
    ----------
    columns
        ``[B, W]`` int64, ascending: where each stood, -1 at padding.
    """
    index = torch.where(columns < 0, length, columns)
    ranks = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    return columns.new_full((len(columns), length + 1), -1).scatter(1, index, ranks)[:, :length].cummax(dim=1).values


def spread(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows ``[B, k]`` of ``[..., B, W, C]``, zeros for -1: states and logits that nothing led to."""
    rows = rows.to(x.device)
    batch = torch.arange(len(rows), device=x.device)[:, None]
    return torch.nn.functional.pad(x, (0, 0, 0, 1))[..., batch, rows, :]


def repeats(rows: int, batch: int) -> int:
    """Return how often each prompt of a cache of so many stands in a batch, or raise `InputError`."""
    if batch % rows:
        raise InputError(f"a cache of {rows} prompts cannot be continued with a batch of {batch}")
    return batch // rows


def plan(ids: Tensor, mask: Tensor | None, spans: Sequence[Span], selection: Selection) -> Compaction:
    """Work out which columns stay. The width comes from shapes alone, so nothing waits for the device.

    Parameters
    ----------
    ids
        ``[B, L]``.
    mask
        ``[B, L]``, zero at padding, or `None`.
    """
    batch, length = ids.shape
    check_mask(mask, length)
    host_mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.cpu().bool()
    content = host_mask.sum(dim=1)
    keep = host_mask.to(ids.device, copy=True)
    for span, chosen in zip(spans, selection, strict=True):
        check_visible(host_mask, span)
        columns = span.columns.to(ids.device)
        keep[span.sample, columns] = False
        keep[span.sample, columns[chosen.kept.to(ids.device)]] = True
        content[span.sample] -= len(span) - len(chosen)
    width = int(content.max())
    pads_right = bool((~host_mask[:, -1]).any())
    if pads_right:
        columns = torch.argsort((~keep).int(), dim=1, stable=True)[:, :width]
    else:
        columns = torch.argsort(keep.int(), dim=1, stable=True)[:, length - width :]
    padded = bool((content < width).any())
    if padded:
        columns = torch.where(keep.gather(1, columns), columns, -1)
    return Compaction(columns, length, padded)


def check_mask(mask: Tensor | None, length: int) -> None:
    """Raise `InputError` unless a mask has one entry per column of the prompts."""
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != length):
        raise InputError(
            f"an attention mask has shape [batch, {length}] here, not {list(mask.shape)}: pass the 2-D mask"
        )


def check_visible(mask: Tensor, span: Span) -> None:
    """Raise `InputError` if a mask ``[B, L]`` on the CPU hides placeholders of an image."""
    if not bool(mask[span.sample, span.columns].all()):
        raise InputError("the attention mask hides some visual placeholders: pass the processor's own mask")


def full_positions(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Return the position ids ``[B, L]`` that the unpruned prompt has, zero at padding."""
    if mask is None:
        return torch.arange(length, device=device).expand(batch, -1)
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def position_behind(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Return the position ``[B]`` at which text goes on behind prompts with positions ``[axes, B, L]``."""
    highest = positions.amax(dim=0)
    if mask is None:
        return highest[:, -1] + 1
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1, keepdim=True)
    return highest.gather(1, last.to(highest.device))[:, 0] + 1
