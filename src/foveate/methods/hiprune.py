"""HiPrune: what middle layers attend to, with its neighbours, and what the last layer attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(CropReducer):
    """HiPrune (arXiv 2508.00553): anchors from a middle layer, their four neighbours, and a fill from the last layer.

    Both layers give the attention ``[N]`` that each token receives, averaged over heads and all query rows. The
    ``round(T * alpha / 5)`` strongest tokens of the middle layer are anchors; they and their neighbours on the grid
    are kept, and the strongest other tokens of the last layer fill the budget. Where anchors and neighbours alone are
    more than T, the strongest of them in the middle layer stay.

    Parameters
    ----------
    keep
        The budget T, per image or per crop: the method needs the whole grid.
    alpha
        Share of the budget for anchors and neighbours, from 0 to 1. No anchors if ``T * alpha / 5`` rounds to zero.
    object_layer
        The middle layer, as a share of the depth in [0, 1): 1 / 3 is layer 8 (from 0) of the 24 of CLIP-L. The
        authors take layer 15 of the 32 of Qwen2.5-VL, which is 15 / 32. In encoders with attention within windows it is
        the nearest layer that attends to whole pictures: 7 there by default.
    wrap
        As published, neighbours are counted along the raster: those beyond the end of a row are in the next one, and
        those outside of the grid become its first or last token. With `False` they do not exist.

    Notes
    -----
    Deviations from the paper: encoders whose tokens are merged from several patches use the mean over the patches, and
    images of one prompt are treated one by one with their own widths (UNVERIFIED against the published numbers).
    """

    alpha: float = 0.1
    object_layer: float = 1 / 3
    wrap: bool = True

    paper = "arXiv:2508.00553"
    complexity = "O(N log N)"
    reads_grid = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise FoveateError(f"alpha is a share of the budget from 0 to 1, not {self.alpha}")
        if not 0.0 <= self.object_layer < 1.0:
            raise FoveateError(
                f"object_layer is a share of the encoder's depth from 0 up to 1, such as 1/3, not {self.object_layer}"
            )

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return probes.Attention(of="received", layers=(float(self.object_layer),)), probes.Attention(of="received")

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        middle, last = (crops.probe(probe) for probe in self.needs)
        anchors = ranking.descending(middle)[:, : round(count * self.alpha / 5)]
        cross = torch.zeros(middle.shape, dtype=torch.bool, device=middle.device)
        cross.scatter_(1, self._crosses(anchors, crops.require_grid(self.name)).flatten(1), True)
        place = torch.where(cross, ranking.ranks(middle), crops.size + ranking.ranks(last))
        return place.argsort(dim=1)[:, :count]

    def _crosses(self, anchors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return each anchor ``[B, K]`` and its neighbours, ``[B, K, 5]``; a missing one is the anchor itself."""
        height, width = grid
        steps = torch.tensor([[0, -1, 1, 0, 0], [0, 0, 0, -1, 1]])
        rows, columns = steps.to(anchors.device, non_blocking=True).unbind()
        near = anchors[:, :, None] + rows * width + columns
        if self.wrap:
            return near.clamp(0, height * width - 1)
        row, column = (anchors // width)[:, :, None] + rows, (anchors % width)[:, :, None] + columns
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return torch.where(inside, near, anchors[:, :, None])
