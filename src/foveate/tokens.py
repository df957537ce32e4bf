"""Visual tokens: what a method may see, ragged by span and never padded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foveate.budget import Keep, resolve
from foveate.errors import InputError, UnsupportedModelError
from foveate.probes import Probe
from foveate.selection import Selection, SpanSelection


@dataclass(frozen=True, eq=False)
class Crop:
    """A part of a span that went through the vision encoder by itself: an image, a tile, a frame.

    Attributes
    ----------
    index
        ``[n]`` int64 on the CPU: where the crop's tokens lie in the span, ascending.
    grid
        Rows and columns of its tokens, ``h * w == n``; `None` once an earlier method has thinned it out.
    box
        Left, top, right, bottom of the crop in the image, as shares of its width and height.
    offset
        First row and column of `grid` in the encoder's own grid (not zero where padding was cut off).
    encoder_row
        Which row of the encoder's batch it is.
    """

    index: Tensor
    grid: tuple[int, int] | None
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    offset: tuple[int, int] = (0, 0)
    encoder_row: int = 0

    def __len__(self) -> int:
        return int(self.index.shape[0])


@dataclass(frozen=True, eq=False)
class Span:
    """The run of visual tokens of one image, tile set or video in one prompt.

    Attributes
    ----------
    kind
        ``"image"`` or ``"video"``.
    sample
        Row of the batch.
    ordinal
        Which span of its prompt it is, from 0.
    columns
        ``[N]`` int64 on the CPU: the columns of ``input_ids`` that hold its placeholders.
    grid
        Frames or crops, rows, columns: ``(t, h, w)``.
    crops
        The parts that methods select from. Tokens in no crop are separators (newline vectors, a frame's ``[CLS]``).
    extents
        For each separator, the first and the last + 1 of the tokens in the span that it belongs to (a row, a frame).
    """

    kind: str
    sample: int
    ordinal: int
    columns: Tensor
    grid: tuple[int, int, int]
    crops: tuple[Crop, ...]
    extents: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return int(self.columns.shape[0])

    def separators(self) -> Tensor:
        """Return the positions of tokens that belong to no crop, ``[S]`` int64 ascending."""
        free = torch.ones(len(self), dtype=torch.bool)
        for crop in self.crops:
            free[crop.index] = False
        return free.nonzero().flatten()

    def budget(self, keep: Keep) -> list[int]:
        """Return how many tokens `keep` leaves in each crop; a single number for all with a joint budget."""
        sizes = [len(crop) for crop in self.crops]
        budget = resolve(keep, self.kind, self.ordinal)
        return [budget.count(sum(sizes))] if budget.per == "joint" else budget.split(sizes)


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
        Where `probe` tensors live.
    """

    grid: tuple[int, int] | None
    ordinals: tuple[int, ...]
    size: int
    device: torch.device
    planes: dict[Probe, Tensor]

    def probe(self, probe: Probe) -> Tensor:
        """Return a probe's values, ``[B, N, ...]``."""
        return self.planes[probe]

    def require_grid(self, method: str) -> tuple[int, int]:
        """Return the grid, or raise if the tokens form none: thinned out before, or of several crops at once."""
        if self.grid is None:
            raise InputError(
                f"{method} needs the whole token grid of a crop: put it first in the chain, and use a budget "
                "per 'image' or per 'crop'"
            )
        return self.grid


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """What a method may see: spans, their crops, and the probes it asked for.

    Attributes
    ----------
    spans
        In the order of the batch.
    planes
        For each probe a list with one tensor ``[n, ...]`` per crop, crops counted through all spans in order.
    device
        Where the tokens live.
    hidden
        What the projector reads, ``[N, C]`` per span in span order, for the engine.
    """

    spans: tuple[Span, ...]
    planes: dict[Probe, list[Tensor]]
    device: torch.device
    hidden: list[Tensor] = field(default_factory=list)

    def probe(self, probe: Probe) -> list[Tensor]:
        """Return a probe's values per crop, each ``[n, ...]``."""
        if probe not in self.planes:
            raise UnsupportedModelError(f"the probe {probe!r} was not collected: list it in the reducer's `needs`")
        return self.planes[probe]

    def per_crop(self, keep: Keep, pick: Callable[[CropBatch, int], Tensor]) -> Selection:
        """Select within each crop, crops of equal size and budget at once.

        Parameters
        ----------
        keep
            The budget. Crops that keep all their tokens are not shown to `pick`.
        pick
            Maps a `CropBatch` of B crops of N tokens and a count T to the kept tokens, ``[B, T]`` int64 in any order.
        """
        kept: dict[int, list[Tensor]] = defaultdict(list)
        work: dict[tuple[int, int, tuple[int, int] | None], list[_Unit]] = defaultdict(list)
        for unit, count in self._units(keep):
            index = unit.index.to(self.device)
            if count >= unit.size:
                kept[unit.span].append(index)
            elif count > 0:
                work[unit.size, count, unit.grid].append(replace(unit, index=index))
        for (size, count, grid), units in work.items():
            batch = CropBatch(
                grid, tuple(u.ordinal for u in units), size, self.device,
                {probe: torch.stack([u.gather(plane) for u in units]) for probe, plane in self.planes.items()},
            )  # fmt: skip
            chosen = pick(batch, count)
            for unit, row in zip(units, chosen, strict=True):
                kept[unit.span].append(unit.index.index_select(0, row))
        return Selection(
            tuple(
                SpanSelection(len(s), _merged(kept[i], self.device), sample=s.sample, kind=s.kind)
                for i, s in enumerate(self.spans)
            )
        )

    def after(self, selection: Selection) -> VisualTokens:
        """Return the tokens as they are once `selection` is applied, for the next method of a chain."""
        spans, planes, c = [], {probe: list(x) for probe, x in self.planes.items()}, 0
        for span, chosen in zip(self.spans, selection, strict=True):
            crops = []
            for crop in span.crops:
                index = crop.index.to(self.device)
                rank = torch.isin(index, chosen.kept).nonzero().flatten()
                grid = crop.grid if len(rank) == len(crop) else None
                for x in planes.values():
                    x[c] = x[c].index_select(0, rank)
                crops.append(replace(crop, index=index.index_select(0, rank).cpu(), grid=grid))
                c += 1
            spans.append(replace(span, crops=tuple(crops)))
        return VisualTokens(tuple(spans), planes, self.device, self.hidden)

    def _units(self, keep: Keep) -> list[tuple[_Unit, int]]:
        """List the sets of tokens that compete with each other: crops, or all crops of a span at once."""
        units, c, seen = [], 0, [0] * (1 + max((s.sample for s in self.spans), default=0))
        for s, span in enumerate(self.spans):
            counts, width = span.budget(keep), len(span.crops)
            first = seen[span.sample]
            if resolve(keep, span.kind, span.ordinal).per == "joint":
                grid = span.crops[0].grid if width == 1 else None
                index = torch.cat([crop.index for crop in span.crops])
                units.append((_Unit(s, first, tuple(range(c, c + width)), index, grid), counts[0]))
            else:
                for j, crop in enumerate(span.crops):
                    units.append((_Unit(s, first + j, (c + j,), crop.index, crop.grid), counts[j]))
            seen[span.sample] += width
            c += width
        return units


@dataclass(frozen=True, eq=False)
class _Unit:
    span: int
    ordinal: int
    crops: tuple[int, ...]
    index: Tensor
    grid: tuple[int, int] | None

    @property
    def size(self) -> int:
        return int(self.index.shape[0])

    def gather(self, plane: Sequence[Tensor]) -> Tensor:
        parts = [plane[c] for c in self.crops]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _merged(parts: list[Tensor], device: torch.device) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=torch.long, device=device)
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).sort().values
