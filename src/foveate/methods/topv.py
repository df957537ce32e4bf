"""TopV: one cut in the LLM by optimal transport between what goes into a layer and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from foveate.author import (
    Budget,
    BudgetError,
    FoveateError,
    Images,
    InLlmReducer,
    InputError,
    Keep,
    LayerTokens,
    Selection,
    probes,
    ranking,
    register,
    schedules,
)

SPACE, CENTRE, SIGMA, ENTROPY, ITERATIONS = 1.0, 0.01, 10.0, 0.1, 3
"""Weights of the distance between tokens and to the centre beside that of features, the width of the former in
tokens, the entropic regularisation, and the rounds of the solver."""


@register("topv")
@dataclass(frozen=True)
class TopV(InLlmReducer):
    """TopV (arXiv 2503.18278, CVPR 2025): what tokens contribute to those that leave a shallow layer, no attention.

    The tokens that go into the layer in front of the cut are sources, the same tokens further on in it are targets.
    Transport costs the distance of the features, that of the places and that of the source to the centre; the mass that
    a source sends is its importance. Of the tokens that are dropped, every so many-th comes back.

    Parameters
    ----------
    keep
        The budget, recovered tokens included; of several images or tiles in proportion to their size. Separators stay
        and count.
    layer
        The first layer that runs without the dropped tokens, counted from 0: the paper's layer index 2, plus 1.
    recovery
        Of the dropped tokens, in raster order, every `recovery`-th is kept (the paper has 4 and 6); 0 keeps none.
    target
        Where in the layer the targets are: ``"mlp"``, behind the norm in front of its feed-forward network, or its
        ``"output"``.
    score
        ``"transport"``, or ``"cost"``: the mean of what a source would pay, as a plain baseline.
    equivalent
        Instead of `keep`: how many tokens per image (or which share) the layers receive on average.

    Notes
    -----
    No official code was public, and of the paper only parts: UNVERIFIED are the layer's count from 0, the targets, the
    distance of features (here Euclidean, of rows of unit length), the weights of the costs, the solver's settings, the
    first recovered token and the positions. The solver ends with the update of the targets: were the sources'
    last, as in other implementations, their masses would be their given marginals, whatever the cost.
    """

    keep: Keep | None = None
    layer: int = 3
    recovery: int = 4
    target: Literal["mlp", "output"] = "mlp"
    score: Literal["transport", "cost"] = "transport"
    equivalent: int | float | None = None

    unit = "crop"
    reads_grid = True
    paper = "arXiv:2503.18278"
    complexity = "O(N^2 D)"

    def __post_init__(self) -> None:
        super().__post_init__()
        schedules.check_equivalent(self.name, self.keep, self.equivalent)
        if self.layer < 1:
            raise FoveateError(f"topv needs a layer in front of the cut: layer is at least 1, not {self.layer!r}")
        if self.recovery < 0 or self.recovery == 1:
            raise FoveateError(f"recovery is 0, or 2 and more to keep every so many-th token, not {self.recovery!r}")

    def solved(self, depth: int, tokens: int) -> TopV:
        return replace(self, keep=self.counts(depth, [("image", tokens)])[0]) if self.equivalent is not None else self

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return (probes.LayerStates("input"), probes.LayerStates(self.target))

    def boundaries(self, depth: int) -> Sequence[int]:
        return (schedules.boundary_in(depth, self.layer, self.name),)

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        given = schedules.tokens_of(images)
        count = schedules.one_cut(self.name, self.keep, self.equivalent, self.layer, depth, images)
        if self.recovery and count < (least := -(-given // self.recovery)):
            raise BudgetError(
                f"topv(recovery={self.recovery}) keeps every {self.recovery}th token that it drops, so no less than "
                f"{least} of {given} tokens: {count} need a larger recovery, or 0"
            )
        return (count,)

    def select(self, tokens: LayerTokens) -> Selection:
        sources, targets = (iter(tokens.probe(probe)) for probe in self.needs)
        kept = {}
        for i, span in enumerate(tokens.spans):
            separators = span.separators().to(tokens.device)
            sizes, count = [len(crop) for crop in span.crops], tokens.counts[i] - len(separators)
            if count < 0:
                raise BudgetError(
                    f"topv keeps all {len(separators)} separators of the image, such as the ends of its rows: "
                    f"{tokens.counts[i]} tokens are too few"
                )
            kept[i] = [separators]
            parts = Budget(count).split(sizes) if count > 0 else [0] * len(sizes)
            for crop, part in zip(span.crops, parts, strict=True):
                source, target, places = next(sources), next(targets), crop.places()
                index = crop.index.to(tokens.device)
                if 0 < part < len(crop):
                    if places is None:
                        raise InputError(
                            "topv needs the rows and columns of tokens: use a model whose family knows them"
                        )
                    index = index.index_select(0, self._pick(source, target, places.to(tokens.device), part))
                kept[i].append(index[:part])
        return tokens.selection(kept)

    def _pick(self, source: Tensor, target: Tensor, places: Tensor, count: int) -> Tensor:
        distance = (2 - 2 * ranking.cosine_matrix(source[None], target[None])[0]).clamp(min=0).sqrt()
        cost = visual_cost(distance, places)
        importance = sent(cost) if self.score == "transport" else -cost.mean(dim=1)
        return with_recovery(importance, count, self.recovery)


def visual_cost(distance: Tensor, places: Tensor, sigma: float = SIGMA) -> Tensor:
    """Return what transport from each token to each costs, ``[N, N]`` float32.

    Parameters
    ----------
    distance
        ``[N, N]``: of the features of each source and each target.
    places
        ``[N, 2]``: row and column of each token.
    sigma
        Width of the distance between places, in tokens.
    """
    spots = places.float()
    far = 1 - (-(torch.cdist(spots, spots) ** 2) / (2 * sigma**2)).exp()
    middle = (spots.amin(dim=0) + spots.amax(dim=0)) / 2
    outer = (spots - middle).norm(dim=1, keepdim=True)
    return _scaled(distance.float()) + SPACE * _scaled(far) + CENTRE * _scaled(outer)


def sent(cost: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Return the mass that each source sends ``[N]`` under a transport cost ``[N, N]``, with uniform marginals."""
    share = 1 / len(cost)
    kernel = (-cost / ENTROPY).exp()
    v = torch.ones_like(cost[0])
    for _ in range(iterations):
        u = share / (kernel @ v)
        v = share / (kernel.T @ u)
    return u * (kernel @ v)


def with_recovery(importance: Tensor, count: int, recovery: int) -> Tensor:
    """Return `count` tokens, ascending: the most important of ``[N]``, and every `recovery`-th of the others."""
    size, best = len(importance), count
    if recovery:
        best = max((count * recovery - size) // (recovery - 1), 0)
    order = ranking.descending(importance[None])[0]
    back = order[best:].sort().values[:: recovery or size][: count - best]
    return torch.cat([order[:best], back]).sort().values


def _scaled(x: Tensor) -> Tensor:
    low, high = x.amin(), x.amax()
    return torch.where(high > low, (x - low) / (high - low), 0.0)
