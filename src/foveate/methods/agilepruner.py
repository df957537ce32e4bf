"""AgilePruner: attention for simple pictures, diversity for complex ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register


@register("agilepruner")
@dataclass(frozen=True)
class AgilePruner(CropReducer):
    """AgilePruner (arXiv 2603.01236, ICLR 2026): how far tokens have to be apart follows from the picture.

    Tokens are visited by ``[CLS]`` attention ``[N]``. The one at place i, from 0, is kept if its cosine distance, of
    features ``[N, C]``, to all kept ones is at least ``min(limit, step * i * complexity)``, until there are T; if too
    few are, the most salient of the others follow. The complexity of the picture is the effective rank of its features
    over a typical one: the exponential of the entropy of their normalised singular values.

    Parameters
    ----------
    keep
        The budget T.
    step
        Growth of the distance from one place to the next, at least 0. With 0 this is FasterVLM.
    limit
        Largest distance that is asked for, from 0 to 2.
    typical
        Typical effective rank, as a share of ``min(N, C)``, in (0, 1].

    Notes
    -----
    The singular values take ``O(N C min(N, C))`` and most of the time. Finding them waits for the device, as
    `torch.linalg.svdvals` reports back whether it converged.

    Deviations from the paper: its code is not released. The rule follows the description of the repository; the values
    of `limit` and `typical`, constants of a model there, are UNVERIFIED choices: measure before you trust them.
    Encoders without ``[CLS]`` use the attention that each token receives.
    """

    step: float = 0.01
    limit: float = 0.3
    typical: float = 0.5

    needs = (probes.Features(), probes.Attention())
    paper = "arXiv:2603.01236"
    complexity = "O(N C min(N, C) + N^2 C + T N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.step < float("inf"):
            raise FoveateError(f"step is a finite distance of at least 0, not {self.step}")
        if not 0.0 <= self.limit <= 2.0:
            raise FoveateError(f"limit is a cosine distance from 0 to 2, not {self.limit}")
        if not 0.0 < self.typical <= 1.0:
            raise FoveateError(f"typical is a share of the largest possible rank, above 0 and up to 1: {self.typical}")

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        features, size = crops.probe(probes.Features()), crops.size
        order = ranking.descending(crops.probe(probes.Attention()))
        listed = features.take_along_dim(order[:, :, None], dim=1)
        place = torch.arange(size, device=order.device)
        complexity = effective_rank(features) / (self.typical * min(features.shape[1:]))
        asked = (self.step * place * complexity[:, None]).clamp(max=self.limit)

        similarity = ranking.cosine_matrix(listed)
        nearest = torch.full(order.shape, torch.inf, device=order.device)
        ahead = torch.ones(order.shape, dtype=torch.bool, device=order.device)
        kept = torch.zeros_like(ahead)
        for _ in range(count):
            # Those passed over were too close to a token that is kept, and stay so.
            fits = torch.where(ahead & (nearest >= asked), place, size).amin(dim=1, keepdim=True)
            kept = kept | (place == fits)
            ahead = place > fits
            nearest = torch.minimum(nearest, 1 - ranking.row_of(similarity, fits.clamp(max=size - 1)))
        return order.gather(1, torch.where(kept, place, size + place).argsort(dim=1)[:, :count])


def effective_rank(features: Tensor) -> Tensor:
    """Return the effective rank of features ``[B, N, C]``, ``[B]`` float64 from 1 to ``min(N, C)``."""
    values = torch.linalg.svdvals(features.double().nan_to_num())
    share = values / values.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.exp(-torch.xlogy(share, share).sum(dim=-1))
