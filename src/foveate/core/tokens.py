"""Visual tokens: what a method may see, ragged by span and never padded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core.budget import Coverage, Keep, resolve
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.probes import Probe
from foveate.core.selection import Merge, Selection, SpanSelection


@dataclass(frozen=True, eq=False)
class Crop:
    """A part of a span that went through the vision encoder by itself: an image, a tile, a frame.

    Attributes
    ----------
    index
        ``[n]`` int64 on the CPU: where the crop's tokens lie in the span, ascending.
    grid
        Rows and columns of its tokens, ``h * w == n``; `None` if unknown, or once an earlier method has thinned it
        out.
    box
        Left, top, right, bottom of the crop in the image, as shares of its width and height; `None` for a tile where
        the inputs do not tell how tiles are arranged (see `Family.located`).
    offset
        First row and column of `grid` in the encoder's own grid (not zero where padding was cut off).
    encoder_row
        Which row of the encoder's batch it is.
    cells
        ``[n, 2]`` int64 on the CPU: row and column of each token in the grid that an earlier method has thinned out;
        `None` while `grid` tells them, or if they are unknown.
    """

    index: Tensor
    grid: tuple[int, int] | None
    box: tuple[float, float, float, float] | None = (0.0, 0.0, 1.0, 1.0)
    offset: tuple[int, int] = (0, 0)
    encoder_row: int = 0
    cells: Tensor | None = None

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def places(self) -> Tensor | None:
        """Return the row and the column of each token, ``[n, 2]`` int64 on the CPU, or `None` if they are unknown."""
        if self.grid is None:
            return self.cells
        return torch.cartesian_prod(torch.arange(self.grid[0]), torch.arange(self.grid[1]))

    def thinned(self, rank: Tensor, index: Tensor) -> Crop:
        """Return the crop with some of its tokens ``[k]`` alone, which now lie at `index` ``[k]``."""
        if len(rank) == len(self):
            return replace(self, index=index)
        cells = self.places()
        return replace(self, index=index, grid=None, cells=None if cells is None else cells.index_select(0, rank))


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
    covered
        Tokens per crop that adaptive budgets come to for this image, once its saliency is known.
    """

    kind: str
    sample: int
    ordinal: int
    columns: Tensor
    grid: tuple[int, int, int]
    crops: tuple[Crop, ...]
    extents: tuple[tuple[int, int], ...] = ()
    covered: Mapping[Coverage, tuple[int, ...]] = field(default_factory=dict)

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
        if isinstance(budget, Coverage):
            if budget not in self.covered:
                budget.count(len(self))  # raises
            counts = self.covered[budget]
            return [sum(counts)] if budget.per == "joint" else list(counts)
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
        """Return a probe's values, ``[B, N, ...]``."""
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
        What the projector reads, ``[N, C]`` per span in span order, for the engine; with `cls` the ``[CLS]`` token of
        each crop follows, ``[N + crops, C]``.
    embedded
        The same after the projector, ``[N, D]`` per span, if a method asked for `Embeddings`.
    cls
        Whether `hidden` holds the ``[CLS]`` tokens.
    queries
        Per prompt the input embeddings of its text ``[M, D]``, if a method asked for `Query`.
    """

    spans: tuple[Span, ...]
    planes: dict[Probe, list[Tensor]]
    device: torch.device
    hidden: list[Tensor] = field(default_factory=list)
    embedded: list[Tensor] | None = None
    cls: bool = False
    queries: tuple[Tensor, ...] | None = None

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
        for unit, index, count in self._whole(keep):
            if count:
                kept[unit.span].append(index)
        for units, batch, count in self._batches(keep):
            for unit, row in zip(units, pick(batch, count), strict=True):
                kept[unit.span].append(unit.index.index_select(0, row))
        return self.selection(kept)

    def selection(self, kept: Mapping[int, Sequence[Tensor]]) -> Selection:
        """Return the plain selection of kept positions, which come per span, in parts and in any order."""
        return Selection(
            tuple(
                SpanSelection(
                    len(s),
                    _joined(kept.get(i, ()), self.device).sort().values,
                    sample=s.sample,
                    kind=s.kind,
                    extra=len(s.crops) if self.cls else 0,
                )
                for i, s in enumerate(self.spans)
            )
        )

    def per_crop_merge(self, keep: Keep, pick: Callable[[CropBatch, int], Groups]) -> Selection:
        """Merge within each crop, crops of equal size and budget at once.

        Parameters
        ----------
        keep
            The budget. Crops that keep all their tokens are not shown to `pick`.
        pick
            Maps a `CropBatch` and a count T to the `Groups` of its crops.
        """
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = defaultdict(list)
        merged: set[int] = set()
        for unit, index, count in self._whole(keep):
            if count:
                own = torch.arange(count, device=self.device)
                parts[unit.span].append((index, own, index, torch.ones(count, device=self.device)))
        for units, batch, count in self._batches(keep):
            for unit, (kept, target, source, weight) in zip(units, pick(batch, count).per_crop(), strict=True):
                rows = unit.index
                if batch.cls is not None:
                    rows = torch.cat([rows, rows.new_tensor([len(self.spans[unit.span]) + unit.first_of_span])])
                parts[unit.span].append((rows.index_select(0, kept), target, rows.index_select(0, source), weight))
                merged.add(unit.span)
        extra = [len(span.crops) if self.cls else 0 for span in self.spans]
        return Selection(
            tuple(
                replace(merged_selection(span, parts[i], i in merged, self.device), extra=extra[i])
                for i, span in enumerate(self.spans)
            )
        )

    def _whole(self, keep: Keep) -> Iterator[tuple[_Unit, Tensor, int]]:
        """Units that keep all their tokens, or none."""
        for unit, count in self._units(keep):
            if count >= unit.size or count == 0:
                yield unit, unit.index.to(self.device), min(count, unit.size)

    def _batches(self, keep: Keep) -> Iterator[tuple[list[_Unit], CropBatch, int]]:
        """Stack the units that a method has to decide on, those of equal shape and budget together."""
        work: dict[Any, list[_Unit]] = defaultdict(list)
        for unit, count in self._units(keep):
            if 0 < count < unit.size:
                words = None if self.queries is None else len(self.queries[self.spans[unit.span].sample])
                joint = len(unit.crops) > 1
                work[unit.size, count, unit.grid, words, joint].append(replace(unit, index=unit.index.to(self.device)))
        for (size, count, grid, _, joint), units in work.items():
            planes = {probe: torch.stack([u.gather(plane) for u in units]) for probe, plane in self.planes.items()}
            query = None
            if self.queries is not None:
                query = torch.stack([self.queries[self.spans[u.span].sample] for u in units])
            cls = size if self.cls and not joint else None
            ordinals = tuple(u.ordinal for u in units)
            yield units, CropBatch(grid, ordinals, size, self.device, planes, cls, query), count

    def after(self, selection: Selection) -> VisualTokens:
        """Return the tokens as they are once `selection` is applied, for the next method of a chain."""
        spans, planes, c = [], {probe: list(x) for probe, x in self.planes.items()}, 0
        for span, chosen in zip(self.spans, selection, strict=True):
            crops = []
            for crop in span.crops:
                index = crop.index.to(self.device)
                rank = torch.isin(index, chosen.kept).nonzero().flatten()
                for x in planes.values():
                    x[c] = x[c].index_select(0, rank)
                rank = rank.cpu()
                crops.append(crop.thinned(rank, crop.index.index_select(0, rank)))
                c += 1
            spans.append(replace(span, crops=tuple(crops)))
        return replace(self, spans=tuple(spans), planes=planes)

    def _units(self, keep: Keep) -> list[tuple[_Unit, int]]:
        """List the sets of tokens that compete with each other: crops, or all crops of a span at once."""
        units, c = [], 0
        seen = {span.sample: 0 for span in self.spans}
        for s, span in enumerate(self.spans):
            counts, width = span.budget(keep), len(span.crops)
            first = seen[span.sample]
            if resolve(keep, span.kind, span.ordinal).per == "joint":
                grid = span.crops[0].grid if width == 1 else None
                index = torch.cat([crop.index for crop in span.crops])
                units.append((_Unit(s, first, 0, tuple(range(c, c + width)), index, grid), counts[0]))
            else:
                for j, crop in enumerate(span.crops):
                    units.append((_Unit(s, first + j, j, (c + j,), crop.index, crop.grid), counts[j]))
            seen[span.sample] += width
            c += width
        return units


@dataclass(frozen=True, eq=False)
class _Unit:
    span: int
    ordinal: int
    first_of_span: int
    crops: tuple[int, ...]
    index: Tensor
    grid: tuple[int, int] | None

    @property
    def size(self) -> int:
        return int(self.index.shape[0])

    def gather(self, plane: Sequence[Tensor]) -> Tensor:
        parts = [plane[c] for c in self.crops]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def merged_selection(
    span: Span, parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], merges: bool, device: torch.device
) -> SpanSelection:
    """Join what each part of a span is left with, as in `Groups.per_crop`, to the selection of the span."""
    kept, order = _joined([place for place, *_ in parts], device).sort()
    merge = None
    if merges:
        rank, targets, start = order.argsort(), [], 0
        for place, target, *_ in parts:
            targets.append(target + start)
            start += len(place)
        source, weight = (torch.cat([part[i] for part in parts]) for i in (2, 3))
        merge = Merge(rank[torch.cat(targets)], source, weight)
    return SpanSelection(len(span), kept, merge, span.sample, span.kind)


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.long, device=device)
