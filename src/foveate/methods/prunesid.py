"""PruneSID: groups by principal components, and the salient, distinct tokens of each group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, probes, ranking, register


@register("prunesid")
@dataclass(frozen=True)
class PruneSID(CropReducer):
    """PruneSID (arXiv 2603.09480, ICLR 2026): semantic groups, thinned out within, share the budget.

    A token belongs to that one of ``T // 4`` principal components of the sigmoid of the features ``[N, C]`` on which
    its loading is largest. Within a group tokens are visited by ``[CLS]`` attention ``[N]``, and one is suppressed if
    its cosine with an earlier survivor is above ``T / 32`` times the mean cosine of the crop. Each group gets one
    place, and the other places in proportion to survivors, at most ``5 * ceil(T / 64)`` in all; what that leaves goes
    round the groups, largest first, until the survivors are used up and then to the others.

    Parameters
    ----------
    keep
        The budget T.

    Notes
    -----
    The decomposition in float64 takes ``O(N^3)`` and most of the time. It waits for the device, as `torch.linalg.eigh`
    reports back whether it converged. Components of
    equal variance, as in a picture of very few distinct tokens, are only defined up to a rotation.

    Deviations from the paper: components come from an exact decomposition in float64, where the official code draws a
    random one, and there are fewer than ``T // 4`` of them if the features span no more. The ``[CLS]`` token, which the
    paper keeps as one of the T, is none of the model's visual tokens and is left out. At most T survivors of a group
    are counted. UNVERIFIED: that the mean cosine is that of all pairs of different tokens of the crop; the order in
    which the last places are given. Encoders without ``[CLS]`` use the attention that each token receives.
    """

    needs = (probes.Features(), probes.Attention())
    paper = "arXiv:2603.09480"
    complexity = "O(N^2 C + N^3)"

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        features, place, size = (
            crops.probe(probes.Features()),
            ranking.ranks(crops.probe(probes.Attention())),
            crops.size,
        )
        group, groups = _components(features, max(1, count // 4))
        similarity = ranking.cosine_matrix(features)
        redundancy = (similarity.sum(dim=(1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(dim=1)) / (size * (size - 1))
        copies = similarity > (count / 32 * redundancy)[:, None, None]
        survives = _survivors(copies, group, groups, place, count)

        members = torch.nn.functional.one_hot(group, groups)
        sizes, survivors = members.sum(dim=1), (members * survives[:, :, None]).sum(dim=1)
        quota = _quotas(sizes, survivors, count)

        # Listed group by group, survivors first, most salient first: the i-th entry is in the group at that place.
        order = ((group * 2 + ~survives) * size + place).argsort(dim=1)
        home = group.gather(1, order)
        start = (sizes.cumsum(dim=1) - sizes).gather(1, home)
        surplus = torch.arange(size, device=order.device) - start - quota.gather(1, home)
        suppressed = ~survives.gather(1, order)
        rounds = (suppressed * size + surplus) * groups + ranking.ranks(sizes).gather(1, home)
        return order.gather(1, torch.where(surplus < 0, -1, rounds).argsort(dim=1, stable=True)[:, :count])


def _components(features: Tensor, number: int) -> tuple[Tensor, int]:
    """Return the principal component of each token of ``[B, N, C]``, ``[B, N]``, and the number of components."""
    values = features.double().nan_to_num().sigmoid()
    values = values - values.mean(dim=-1, keepdim=True)
    number = max(1, min(number, features.shape[1], features.shape[2] - 1))
    variances, vectors = torch.linalg.eigh(torch.bmm(values, values.mT))
    # Where features span less than that, the remaining components are noise.
    empty = variances <= 1e-10 * variances[:, -1:]
    loadings = vectors.abs().masked_fill(empty[:, None], 0.0).flip(-1)[:, :, :number]
    return loadings.argmax(dim=-1), number


def _survivors(copies: Tensor, group: Tensor, groups: int, place: Tensor, most: int) -> Tensor:
    """Suppress copies of better tokens in all groups at once; return which tokens survive, at most so many per group.

    Parameters
    ----------
    copies
        ``[B, N, N]`` bool: pairs too close to keep both.
    group, place
        ``[B, N]``: the group of each token, and its place by attention.
    """
    size = place.shape[1]
    index = place.argsort(dim=1)  # the token at each place, and one that stands for none
    survives = torch.zeros_like(copies[:, 0])
    free = torch.ones_like(survives)
    for _ in range(min(most, size)):
        best = torch.full((len(group), groups), size, device=group.device)
        best = best.scatter_reduce(1, group, torch.where(free, place, size), "amin").gather(1, group)
        picked = free & (place == best)
        survives = survives | picked
        leader = index.gather(1, best.clamp(max=size - 1))
        close = copies.gather(2, leader[:, :, None]).squeeze(2)
        free = free & ~picked & ~close
    return survives


def _quotas(sizes: Tensor, survivors: Tensor, count: int) -> Tensor:
    """Return the places of each group ``[B, G]`` before any are left over."""
    full = (sizes > 0).long()
    total = survivors.sum(dim=1, keepdim=True)
    spare = count - full.sum(dim=1, keepdim=True)
    until = (2 * spare * survivors.cumsum(dim=1) + total) // (2 * total)  # shares add up: their sums are rounded
    share = until - torch.nn.functional.pad(until, (1, 0))[:, :-1]
    return (full + share).clamp(max=5 * -(-count // 64)).minimum(survivors)
