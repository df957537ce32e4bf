"""The bias of each column of some prompts, layer by layer: what lies beside a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.core.rectify import Shares, bias
from foveate.core.selection import Selection
from foveate.core.spans import Span
from foveate.engines.transformers.compaction import Compaction, repeats


@dataclass(frozen=True, eq=False)
class Bias:
    """What the attention logits of each column are raised by.

    Attributes
    ----------
    planes
        ``[B, W]`` float32 over the columns of the first layer, by the first layer that each holds for: methods inside
        the LLM make new ones. Layers in front of the first of them have no bias.
    """

    planes: dict[int, Tensor]

    @property
    def width(self) -> int:
        """Number of columns, W."""
        return int(next(iter(self.planes.values())).shape[1])

    def at(self, layer: int) -> Tensor | None:
        """Return the plane that holds for a layer, `None` without one."""
        return next((plane for first, plane in sorted(self.planes.items(), reverse=True) if first <= layer), None)

    def fitted(self, batch: int, length: int) -> Bias:
        """Return the bias for so many columns, of a batch in which each prompt may stand several times in a row.

        Further columns are text, and have none.
        """
        return Bias({first: _fitted(plane, batch, length) for first, plane in self.planes.items()})

    def behind(self, earlier: Bias | None, filled: int) -> Bias:
        """Return the bias of prompts that begin with so many cached columns, which had one of their own."""
        batch = len(next(iter(self.planes.values())))
        old = Bias({}) if earlier is None else earlier.fitted(batch, filled)
        joined = {}
        for first in {*self.planes, *old.planes}:
            parts = [(old.at(first), filled), (self.at(first), self.width)]
            like = next(x for x, _ in parts if x is not None)
            joined[first] = torch.cat([like.new_zeros(batch, n) if x is None else x for x, n in parts], dim=1)
        return Bias(joined)

    def cut(self, layer: int, plane: Tensor) -> Bias:
        """Return the bias with a new plane ``[B, W]`` from a layer on."""
        return Bias({**self.planes, layer: plane})


def _fitted(plane: Tensor, batch: int, length: int) -> Tensor:
    times = repeats(len(plane), batch)
    plane = plane if times == 1 else plane.repeat_interleave(times, dim=0)
    return pad(plane[:, :length], (0, max(length - plane.shape[1], 0)))


def spread(
    spans: Sequence[Span], selection: Selection, found: Sequence[Shares], strength: float, compaction: Compaction
) -> Bias:
    """Put the bias of the kept tokens of some spans where they are in the compact prompts."""
    device, batch = compaction.columns.device, len(compaction.columns)
    full = torch.zeros(batch, compaction.length, dtype=torch.float32, device=device)
    for span, chosen, one in zip(spans, selection, found, strict=True):
        full[span.sample, span.columns.to(device)[chosen.kept.to(device)]] = bias(one, strength).to(device)
    return Bias({0: compaction.apply(full)})
