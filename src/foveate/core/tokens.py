"""Visual tokens: what a method may see, ragged by span and never padded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core.budget import Keep, resolve
from foveate.core.crops import CropBatch, Groups, grouped, picked
from foveate.core.errors import ContractError
from foveate.core.probes import Probe
from foveate.core.selection import Merge, Selection, SpanSelection
from foveate.core.spans import Span


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
            raise ContractError(f"reads {probe!r}, which was not collected: list it in needs")
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
            for unit, row in zip(units, picked(pick(batch, count), batch, count), strict=True):
                kept[unit.span].append(unit.index.index_select(0, row))
        return self.selection(kept)

    def per_crop_at_most(self, keep: Keep, pick: Callable[[CropBatch, int], tuple[Tensor, Tensor]]) -> Selection:
        """Select within each crop as `per_crop` does, where each crop decides how many tokens it needs.

        Parameters
        ----------
        keep
            The most that a crop may keep. Crops that may keep all their tokens do, and are not shown to `pick`.
        pick
            Maps a `CropBatch` and a count T to tokens ``[B, T]``, the most wanted first, and how many of them stay
            ``[B]``; waits for the device once.
        """
        kept: dict[int, list[Tensor]] = defaultdict(list)
        for unit, index, count in self._whole(keep):
            if count:
                kept[unit.span].append(index)
        for units, batch, count in self._batches(keep):
            rows, needed = pick(batch, count)
            for unit, row, most in zip(units, picked(rows, batch, count), needed.tolist(), strict=True):
                kept[unit.span].append(unit.index.index_select(0, row[:most]))
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
            groups = grouped(pick(batch, count), batch, count)
            for unit, (kept, target, source, weight) in zip(units, groups.per_crop(), strict=True):
                rows = unit.index
                if batch.cls is not None:
                    rows = torch.cat([rows, rows.new_full((1,), len(self.spans[unit.span]) + unit.first_of_span)])
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
                unit = unit.on(self.device)
                yield unit, unit.index, min(count, unit.size)

    def _batches(self, keep: Keep) -> Iterator[tuple[list[_Unit], CropBatch, int]]:
        """Stack the units that a method has to decide on, those of equal shape and budget together."""
        work: dict[Any, list[_Unit]] = defaultdict(list)
        for unit, count in self._units(keep):
            if 0 < count < unit.size:
                words = None if self.queries is None else len(self.queries[self.spans[unit.span].sample])
                joint = len(unit.crops) > 1
                work[unit.size, count, unit.grid, words, joint].append(unit.on(self.device))
        for (size, count, grid, _, joint), units in work.items():
            planes = {probe: _stacked([u.gather(plane) for u in units]) for probe, plane in self.planes.items()}
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

    def on(self, device: torch.device) -> _Unit:
        # Copied like this, small tensors do not make the host wait for what a GPU has still to do.
        return replace(self, index=self.index.to(device, non_blocking=True))

    def gather(self, plane: Sequence[Tensor]) -> Tensor:
        parts = [plane[c] for c in self.crops]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stacked(planes: Sequence[Tensor]) -> Tensor:
    return planes[0][None] if len(planes) == 1 else torch.stack(list(planes))  # one large picture is not copied


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
