"""CDPruner: tokens that are diverse and relevant to the question, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register
from foveate.methods import determinants

_DEPENDENT = 1e-10  # of a token's squared norm: float64 does not tell less from nothing after many projections
_TIE = 1e-10  # share: copies of a token differ by no more in float64
_ROWS = 512  # tokens that are worked on at once
_MOST = torch.finfo(torch.float64).max / 2


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(CropReducer):
    """CDPruner (arXiv 2506.10967, NeurIPS 2025): diversity of the projected tokens, given the question.

    Picks greedily, to maximise the determinant of the kernel ``r_i * cos(e_i, e_j) * r_j`` of embeddings ``[N, D]``.
    The relevance r of a token is the mean cosine between its embedding and the input embeddings of the prompt's text
    ``[M, D]``, brought to 0..1 in each crop. Depends on the question: nothing can be cached across questions.

    Parameters
    ----------
    keep
        The budget T.
    theta
        Weight of the relevance against diversity, in [0, 1): r becomes ``exp(theta / (2 - 2 * theta) * r)``. With 0
        only diversity counts. `None`, as published, takes r as it is.

    Notes
    -----
    Cosines are computed once, ``O(N^2 D)``; the picks cost ``O(T^2 N)``. Both are in float64: once the picked tokens
    nearly span the others, what is left of these is small beside the rounding of float32, and each pick divides by it.
    Of more than 1,024 tokens on a CPU, cosines are computed only with picked tokens, where a token may win.

    Deviations from the paper: its relevance on LLaVA is the negated cosine of CLIP's patches with CLIP's text tower,
    which the checkpoint of a VLM does not hold. The relevance here is what a third party uses for models without CLIP;
    it is UNVERIFIED against the paper's numbers. It is normalised per crop; over the batch, as in the official code, a
    crop would depend on its batch, so that this is not offered. Neither is OpenVINO's ``relevance_weight``: relevance
    is not mixed with anything. The text is that behind the first image: a question before it is not read if any token,
    such as those that end a chat template, follows. Without text (M = 0) or differences of relevance, it is 1
    everywhere. The official code works in float32 and goes on where its own rounding is all that is left: it does not
    divide by zero, but its picks are arbitrary there. On scenes of nano such a float32 form parts from this one at pick
    63 (median; 41 at the earliest), and 99 % of 64 kept tokens agree, 69 % of 128. Once all other tokens are linear
    combinations of the
    picked ones (less than 1e-10 of their squared norm is left), the most relevant follow.
    """

    theta: float | None = None

    needs = (probes.Embeddings(), probes.Query())
    paper = "arXiv:2506.10967"
    complexity = "O(N^2 D + T^2 N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0.0 <= self.theta < 1.0:
            raise FoveateError(f"theta is from 0 up to, but not including, 1, or None; not {self.theta}")

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        embeddings = crops.probe(probes.Embeddings())
        query = crops.query
        if query is None or query.shape[1] == 0:
            relevance = torch.zeros(embeddings.shape[:2], dtype=torch.float64, device=embeddings.device)
        else:
            # Products and sums token by token, so that copies are equally relevant to the last bit.
            direction = normalize(query.double(), dim=-1).mean(dim=1, keepdim=True)
            parts = torch.split(embeddings, _ROWS, dim=1)
            relevance = torch.cat([(_unit(x) * direction).sum(dim=-1) for x in parts], dim=1)
        weight = weights(relevance, self.theta)
        if crops.size >= determinants.FROM and crops.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.stack([_most_diverse(x, w, count) for x, w in zip(embeddings, weight, strict=True)])
        unit = _unit(embeddings)
        return most_diverse(torch.bmm(unit, unit.mT), weight, count)


def _unit(embeddings: Tensor) -> Tensor:
    return normalize(embeddings.double(), dim=-1)


def weights(relevance: Tensor, theta: float | None = None) -> Tensor:
    """Bring relevance ``[B, N]`` to (0, 1] in each crop, and sharpen it by `theta`."""
    low, high = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
    spread = high - low
    scaled = torch.where(spread > ranking.RESOLUTION, (relevance - low + 1e-6) / spread, 1.0)
    # A common factor of all weights changes no pick; without this one, exp overflows for a theta near 1.
    return scaled if theta is None else torch.exp(theta / (2 - 2 * theta) * (scaled - 1))


def most_diverse(similarity: Tensor, weight: Tensor, count: int) -> Tensor:
    """Maximise ``det(weight_i * similarity_ij * weight_j)`` greedily.

    The weights are factors of the determinant. So the share of each token that is orthogonal to the picked ones is
    followed for unweighted tokens, which is better conditioned, and weighted when tokens are compared.

    Parameters
    ----------
    similarity
        ``[B, N, N]`` cosines, float64.
    weight
        ``[B, N]``, positive, float64.

    Returns
    -------
    Tensor
        ``[B, count]`` int64 in the order of picking.
    """
    left = similarity.diagonal(dim1=1, dim2=2)
    basis = similarity.new_zeros(len(similarity), count, similarity.shape[-1])
    taken = torch.zeros_like(weight, dtype=torch.bool)
    index = torch.arange(weight.shape[1], device=weight.device)
    picks: list[Tensor] = []
    for t in range(count):
        gain = _gain(left, weight).nan_to_num(nan=-_MOST, posinf=_MOST, neginf=-_MOST).masked_fill(taken, -torch.inf)
        highest = gain.amax(dim=1, keepdim=True)
        ties = gain >= highest - _TIE * highest.abs()
        pick = torch.where(ties, index, len(index)).amin(dim=1, keepdim=True)
        taken = taken.scatter(1, pick, True)
        earlier = basis[:, :t]
        shared = (earlier.take_along_dim(pick[:, :, None], dim=2) * earlier).sum(dim=1)
        scale = left.gather(1, pick).clamp(min=_DEPENDENT).rsqrt()
        basis[:, t] = (ranking.row_of(similarity, pick) - shared) * scale
        left = left - basis[:, t].square()
        picks.append(pick)
    return torch.cat(picks, dim=1)


def _most_diverse(embeddings: Tensor, weight: Tensor, count: int) -> Tensor:
    """Do as `most_diverse` for the cosines of one crop ``[N, D]`` of many tokens, of which few pairs are compared."""
    norms = torch.cat([x.double().norm(dim=1, keepdim=True) for x in torch.split(embeddings, _ROWS)]).clamp(min=1e-12)
    squares = torch.cat([_unit(x).square().sum(dim=1) for x in torch.split(embeddings, _ROWS)])
    greedy = determinants.LazyDeterminant(
        lambda tokens: embeddings[tokens].double() / norms[tokens],
        squares,
        lambda left, tokens: _gain(left, weight[tokens]),
        count,
        _TIE,
        _DEPENDENT,
    )
    return greedy.pick()


def _gain(left: Tensor, weight: Tensor) -> Tensor:
    """Return the factor of the determinant; dependent tokens rank among each other by weight, below all others."""
    return torch.where(left > _DEPENDENT, weight.square() * left, -1 / weight)
