"""PruneSID: groups by principal components, and the salient, distinct tokens of each group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, probes, ranking, register

_MOST = 1024  # tokens that are decomposed by themselves


@register("prunesid")
@dataclass(frozen=True)
class PruneSID(CropReducer):
    """PruneSID (arXiv 2603.09480, ICLR 2026): semantic groups, thinned out within, share the budget.

    A token belongs to that one of ``T // 4`` principal components of the sigmoid of the features ``[N, C]`` on which
    its loading is largest. Within a group tokens are visited by ``[CLS]`` attention ``[N]``, and one is suppressed if
    its cosine with an earlier survivor is above ``T / 32`` times the mean cosine of the crop. Each group gets one
    place, and the other places in proportion to survivors, up to the group's cap: ``5 * ceil(T / 64)`` survivors, or
    more, as many for each group, as it takes for the caps to reach the budget; then suppressed tokens, too. Places that
    caps left over go to the group with most survivors until it is at its cap, then to the next.

    Parameters
    ----------
    keep
        The budget, which is one token less than the T above: the official T counts ``[CLS]``, which is no visual token
        of the model. So what is published as 64 tokens keeps 63 of the picture, and is ``keep=63`` here.

    Notes
    -----
    The decomposition in float64 takes ``O(N^3)``, or ``O(N C^2)`` of more than 1,024 tokens, and most of the time. It
    waits for the device, as `torch.linalg.eigh` reports back whether it converged. Components of equal variance, as in
    a picture of very few distinct tokens, are only defined up to a rotation.

    Deviations from the paper: components come from an exact decomposition in float64, where the official code draws a
    random one, and there are fewer than ``T // 4`` of them if the features span no more. At most as many survivors of a
    group as the budget are counted. UNVERIFIED: that the mean cosine is that of all pairs of different tokens of the
    crop; that suppressed tokens fill the groups evenly where there are fewer survivors than places. Encoders without
    ``[CLS]`` use the attention that each token receives.
    """

    needs = (probes.Features(), probes.Attention())
    paper = "arXiv:2603.09480"
    complexity = "O(N^2 C + N min(N, C)^2)"

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        features, place, size = (
            crops.probe(probes.Features()),
            ranking.ranks(crops.probe(probes.Attention())),
            crops.size,
        )
        total = count + 1  # the official budget counts [CLS]
        group, groups = _components(features, max(1, total // 4))
        similarity = ranking.cosine_matrix(features)
        redundancy = (similarity.sum(dim=(1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(dim=1)) / (size * (size - 1))
        copies = similarity > (total / 32 * redundancy)[:, None, None]
        survives = _survivors(copies, group, groups, place, count)

        members = torch.nn.functional.one_hot(group, groups)
        sizes, survivors = members.sum(dim=1), (members * survives[:, :, None]).sum(dim=1)
        quota = _quotas(sizes, survivors, count, 5 * -(-total // 64))

        # Listed group by group, survivors first, most salient first: the first of each group are kept.
        order = ((group * 2 + ~survives) * size + place).argsort(dim=1)
        home = group.gather(1, order)
        start = (sizes.cumsum(dim=1) - sizes).gather(1, home)
        beyond = torch.arange(size, device=order.device) - start >= quota.gather(1, home)
        return order.gather(1, beyond.long().argsort(dim=1, stable=True)[:, :count])


def _components(features: Tensor, number: int) -> tuple[Tensor, int]:
    """Return the principal component of each token of ``[B, N, C]``, ``[B, N]``, and the number of components."""
    values = features.double().nan_to_num().sigmoid()
    values = values - values.mean(dim=-1, keepdim=True)
    number = max(1, min(number, features.shape[1], features.shape[2] - 1))
    if features.shape[1] > max(features.shape[2], _MOST):
        # The same components by way of the channels: where tokens are many, these are fewer.
        variances, directions = torch.linalg.eigh(torch.bmm(values.mT, values))
        vectors = torch.bmm(values, directions[:, :, -number:])
        vectors = torch.nn.functional.normalize(vectors, dim=1)
    else:
        variances, vectors = torch.linalg.eigh(torch.bmm(values, values.mT))
    # Where features span less than that, the remaining components are noise.
    empty = variances <= 1e-10 * variances[:, -1:]
    loadings = vectors.abs()[:, :, -number:].masked_fill(empty[:, None, -number:], 0.0).flip(-1)
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


def _quotas(sizes: Tensor, survivors: Tensor, count: int, least: int) -> Tensor:
    """Return the places of each group ``[B, G]``, `count` in all, given its tokens, its survivors and the least cap."""
    filled = (sizes > 0).long()
    total = survivors.sum(dim=1, keepdim=True)
    suppressed = sizes - survivors
    cap = survivors.minimum(_level(survivors, least, torch.full_like(total, count), count))
    cap = cap + suppressed.minimum(_level(suppressed, 0, count - total, count))

    spare = count - filled.sum(dim=1, keepdim=True)
    until = (2 * spare * survivors.cumsum(dim=1) + total) // (2 * total)  # shares add up: their sums are rounded
    quota = (filled + until - torch.nn.functional.pad(until, (1, 0))[:, :-1]).minimum(cap)

    first = survivors.argsort(dim=1, descending=True, stable=True)
    room = (cap - quota).gather(1, first)
    before = room.cumsum(dim=1) - room
    given = (count - quota.sum(dim=1, keepdim=True) - before).clamp(min=0).minimum(room)
    return quota.scatter_add(1, first, given)


def _level(amounts: Tensor, least: int, need: Tensor, most: int) -> Tensor:
    """Return the smallest level ``[B, 1]`` from `least` up to `most` at which `amounts` ``[B, G]``, cut off, reach it.

    It is `most` if no level does; `need` is ``[B, 1]``.
    """
    levels = torch.arange(most, device=amounts.device)[:, None]
    short = amounts[:, None].minimum(levels).sum(dim=2) < need
    return short.sum(dim=1, keepdim=True).clamp(min=least)
