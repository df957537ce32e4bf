"""HoloV: every region of the picture keeps tokens, in proportion to its attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register


@register("holov")
@dataclass(frozen=True)
class HoloV(CropReducer):
    """HoloV (arXiv 2510.02912, NeurIPS 2025): a quota for each region, and the most salient tokens within it.

    Regions are runs of tokens in raster order, ``N // regions`` long, the first ``N % regions`` one longer. A region's
    share w of the T places is its mean ``[CLS]`` attention, of attention ``[N]``, over the sum of these means. It gets
    ``floor(w * T)`` places; the others go one by one to the regions of largest w.

    Parameters
    ----------
    keep
        The budget T.
    regions
        Number of regions, at most N of which are used; `None` takes ``16 N / 9 T``, at least 1, as the authors do for
        Qwen2.5-VL.

    Notes
    -----
    The official code weighs regions by attention plus the variance of similarities within the region. Since it scales
    the variance to the mean attention of the region, the sum is the mean attention times a constant: features decide
    nothing, and are not read here. The formula in the paper may select differently (UNVERIFIED).

    Deviations from the paper: a region that is full passes its places on to the next regions of largest w, where the
    official code fills up with zero vectors. A region of a single token is weighed as all others. Tokens stay in raster
    order. Encoders without ``[CLS]`` use the attention that each token receives.
    """

    regions: int | None = 16

    needs = (probes.Attention(),)
    paper = "arXiv:2510.02912"
    complexity = "O(N log N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regions is not None and self.regions < 1:
            raise FoveateError(f"a picture has at least one region: regions={self.regions} is not possible, use 16")

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        saliency, size = crops.probe(probes.Attention()).float(), crops.size
        regions = min(max(1, 16 * size // (9 * count)) if self.regions is None else self.regions, size)
        length, longer = divmod(size, regions)
        region = torch.arange(regions, device=crops.device)
        start = region * length + region.clamp(max=longer)
        index = torch.arange(size, device=crops.device)
        home = torch.searchsorted(start, index, right=True) - 1  # the region of each token

        # Sums over padded rows, not scattered ones: these do not depend on the batch or the device's scheduling.
        places = start[:, None] + torch.arange(-(-size // regions), device=crops.device)
        width = length + (region < longer).long()
        outside = places >= (start + width)[:, None]
        mass = saliency.nan_to_num(nan=0.0)[:, places.clamp(max=size - 1)].double().masked_fill(outside, 0.0).sum(dim=2)
        mean = mass / width
        total = mean.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        quota = (mean * count / total).floor().long()

        # Listed region by region, most salient first: the i-th entry lies in the region of token i.
        order = ranking.descending(saliency)
        order = order.gather(1, home[order].argsort(dim=1, stable=True))
        surplus = index - start[home] - quota[:, home]
        rounds = surplus * regions + ranking.ranks(mean)[:, home]
        return order.gather(1, torch.where(surplus < 0, -1, rounds).argsort(dim=1, stable=True)[:, :count])
