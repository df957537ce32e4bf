"""SparseVLM and SparseVLM+: text tokens that belong to the image judge visual tokens at three depths of the LLM."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from foveate.author import (
    BudgetError,
    CropBatch,
    FoveateError,
    Groups,
    Images,
    InLlmReducer,
    Keep,
    LayerTokens,
    Selection,
    UnsupportedModelError,
    clustering,
    probes,
    ranking,
    register,
    schedules,
)

FLOOR = 0.1
"""The least gravity, as a share of that at distance zero."""
LAYERS, DEPTH, TOKENS = (2, 6, 15), 32, 576
"""The pruning layers of the papers, and the depth and the number of visual tokens of the model that they are for."""


@dataclass(frozen=True)
class TextRated(InLlmReducer):
    """What both versions share: the layers, the budgets, and the text tokens whose attention counts."""

    keep: Keep | None = None
    equivalent: int | float | None = None

    lists: ClassVar[Mapping[int, tuple[int, int, int]]]
    """By mean number of tokens, how many are kept by rank behind each of `LAYERS`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        schedules.check_equivalent(self.name, self.keep, self.equivalent)
        if self.keep is not None and self.equivalent is not None:
            raise BudgetError(
                f"{self.name}: keep and equivalent are both a mean over the layers: leave one of them out"
            )

    def boundaries(self, depth: int) -> Sequence[int]:
        cuts = [round(layer * depth / DEPTH) + 1 for layer in LAYERS]
        if len(set(cuts)) < len(cuts) or cuts[-1] >= depth:
            raise UnsupportedModelError(f"{self.name} drops tokens behind three layers: an LLM of {depth} is too short")
        return cuts

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        given, wanted = schedules.tokens_of(images), self._wanted(images)
        if wanted >= given:
            return (given,) * len(LAYERS)
        if depth == DEPTH and self.equivalent is None and self.published():
            for target, kept in self.lists.items():
                if wanted == round(given * target / TOKENS):
                    return self._left(given, [k / TOKENS for k in kept])
        corners = [(0,) * 3, *(self.lists[target] for target in sorted(self.lists)), (TOKENS,) * 3]

        def at(place: float) -> Sequence[int]:
            i = min(int(place), len(corners) - 2)
            pairs = zip(corners[i], corners[i + 1], strict=True)
            return self._left(given, [(a + (b - a) * (place - i)) / TOKENS for a, b in pairs])

        least = self.mean(depth, given, at(0.0))
        if wanted < least:
            raise BudgetError(
                f"{self.name} cannot come down to {wanted:g} of {given} tokens per layer: in an LLM of {depth} layers "
                f"its first cut allows no less than {math.ceil(least)}; use a larger budget"
            )
        low, high = 0.0, len(corners) - 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.mean(depth, given, at(middle)) < wanted else (low, middle)
        return at(high)

    def mean(self, depth: int, given: int, counts: Sequence[int]) -> float:
        """Return the mean number of tokens over the layers, as the budget counts it.

        With `keep` a layer counts by what it hands on, so that a pruning layer counts as pruned; with `equivalent` by
        what it receives.
        """
        borders = [0, *(b - int(self.equivalent is None) for b in self.boundaries(depth)), depth]
        widths = [after - before for before, after in pairwise(borders)]
        return sum(w * n for w, n in zip(widths, (given, *counts), strict=True)) / depth

    def _wanted(self, images: Images) -> float:
        if self.equivalent is not None:
            return schedules.wanted_tokens(self.equivalent, images)
        assert self.keep is not None
        return schedules.budget_of(self.keep, images)

    def published(self) -> bool:
        """Return whether the lists are those of this configuration."""
        return True

    @abstractmethod
    def recycled(self, dropped: int) -> int:
        """Return how many tokens are made of so many dropped ones."""

    def _left(self, given: int, shares: Sequence[float]) -> tuple[int, ...]:
        counts, left = [], given
        for share in shares:
            kept = min(max(round(share * given), 1), left)
            left = kept + self.recycled(left - kept)
            counts.append(left)
        return tuple(counts)

    def judges(self, visual: Tensor, text: Tensor) -> Tensor:
        relevance = (visual.float() @ text.float().T).softmax(dim=1).mean(dim=0)
        raters = relevance > (1 + ranking.RESOLUTION) / len(text)
        return raters | ~raters.any()


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(TextRated):
    """SparseVLM (arXiv 2410.04417, ICML 2025; version 1.5 of its code), with recycling of dropped tokens.

    Raters are the text tokens behind the image with more than their share of the visual tokens' affinity, a softmax
    over the text of ``E_v E_t^T``. Behind three layers, at 2, 6 and 15 of 32, the attention that raters pay in that
    layer, averaged over them and the heads, ranks the tokens. The best of the dropped are clustered, by density peaks
    of their hidden states, and each cluster goes on as its mean behind the tokens that are kept.

    Parameters
    ----------
    keep
        The budget: the mean number of tokens over all layers. As in the paper, a layer behind which tokens are dropped
        counts as if they had not been in it; `schedule` tells what each layer receives.
    equivalent
        Instead of `keep`: how many tokens per image (or which share) the layers receive on average. No official list.
    recycle
        Share of the dropped tokens that are clustered, about ten to a cluster; 0 drops all of them.

    Notes
    -----
    Budgets of 192, 128, 96 and 64 of 576 tokens in 32 layers are the official lists, scaled with the number of tokens;
    others lie between the two lists next to them, where the mean is the budget (UNVERIFIED: our choice). In an LLM
    of another depth the layers move in proportion, and all budgets are met in this way.

    Deviations from the paper: its text ranks an adaptive number of tokens by the rank of the attention, compares states
    by cosine and adds up clusters; here as in its code numbers are fixed, distances are Euclidean and clusters
    averaged. The rule by rank is left out, also as an option: of a matrix in half precision it hangs on rounding, it is
    at most the number of raters, and no budget could be met. No noise is added to densities: of equal ones, the first
    is higher. The code always drops at least one token. If two ways make the same number of tokens, more of them are
    kept by rank of attention. With several images their tokens compete and are clustered together, and the clusters lie
    behind the last token. If no text token stands out, all of the text behind the image rates, without any the last
    token. The places that `Handle.layers` names for clusters, and for kept tokens that make way for them, are
    stand-ins.
    """

    recycle: float = 0.3

    lists: ClassVar = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
    needs = (probes.LayerAttention("judges"), probes.LayerStates())
    merges = "embeddings"
    positions = "compact"
    paper = "arXiv:2410.04417"
    complexity = "O(M S D + N^2 D) per boundary"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.recycle <= 1.0:
            raise FoveateError(f"recycle is a share of the dropped tokens from 0 to 1, not {self.recycle!r}")

    def published(self) -> bool:
        return self.recycle == 0.3

    def recycled(self, dropped: int) -> int:
        return self._clustered(dropped) // 10 + 1 if dropped and self.recycle else 0

    def _clustered(self, dropped: int) -> int:
        return min(int(self.recycle * dropped) + 1, dropped)

    def select(self, tokens: LayerTokens) -> Selection:
        return tokens.per_prompt_merge(self._pick)

    def _pick(self, prompts: CropBatch, count: int) -> Groups:
        size, device = prompts.size, prompts.device
        fitting = (k for k in range(count, 0, -1) if k + self.recycled(size - k) <= count)
        kept = next(fitting, 0)
        clusters = count - kept
        order = ranking.descending(prompts.probe(self.needs[0]))
        chosen = order[:, :kept].sort(dim=1).values
        own = torch.arange(kept, device=device).expand_as(chosen)
        if not clusters:
            return Groups(chosen, own, chosen, torch.ones_like(chosen, dtype=torch.float32))
        again = order[:, kept : kept + max(self._clustered(size - kept), clusters)].sort(dim=1).values
        states = prompts.probe(self.needs[1]).take_along_dim(again[..., None], dim=1)
        labels = torch.stack([clustering.dpc_knn(x, clusters, clusters - 1, itself=True)[0] for x in states])
        ones = torch.ones_like(again, dtype=torch.float32)
        members = ones.new_zeros(len(again), clusters).scatter_add(1, labels, ones)
        last = torch.arange(size - clusters, size, device=device).expand(len(again), -1)
        return Groups(
            torch.cat([ranking.make_room(chosen, size, back=clusters), last], dim=1),
            torch.cat([own, kept + labels], dim=1),
            torch.cat([chosen, again], dim=1),
            torch.cat([torch.ones_like(chosen, dtype=torch.float32), 1 / members.gather(1, labels)], dim=1),
        )


@register("sparsevlm+")
@dataclass(frozen=True)
class SparseVLMPlus(TextRated):
    """SparseVLM+ (arXiv 2410.04417; version 2.0 of its code): a cleaner score instead of recycling.

    Raters and layers are those of `SparseVLM`. Their attention is divided by what the rotary embedding alone gives
    to each distance (`gravity`), so that tokens near the text lose their advantage, and averaged over the heads that
    attend most to the image: 14 of 32. Tokens keep their positions.

    Parameters
    ----------
    keep, equivalent
        The budget, as that of `SparseVLM`.

    Notes
    -----
    Deviations from the paper: gravity is at least a tenth of that at distance zero, as it changes its sign further away
    (from 1707 tokens on for a base of 10000). Distances are counted in tokens, also where positions have
    several axes. With other numbers of heads their share is that of 14 in 32, rounded up. Budgets and raters: see
    `SparseVLM`. Holds the attention of the text ``[N, H, M]``.
    """

    lists: ClassVar = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
    needs = (probes.LayerAttention("judges", over="nothing"),)
    paper = "arXiv:2410.04417"
    complexity = "O(M S D) per boundary"

    def recycled(self, dropped: int) -> int:
        return 0

    def select(self, tokens: LayerTokens) -> Selection:
        kept = {}
        for i, attention in enumerate(tokens.probe(self.needs[0])):
            pull = gravity(tokens.rows[i], tokens.places[i], tokens.frequencies)
            pull = pull.clamp(min=FLOOR * (2 * len(tokens.frequencies)) ** 0.5)
            kept[i] = [ranking.top(priority_scores(attention, tokens.judging[i], pull)[None], tokens.counts[i])[0]]
        return tokens.selection(kept)


def gravity(rows: Tensor, places: Tensor, frequencies: Tensor) -> Tensor:
    """Return the product of rotated queries and keys that are all ones, ``[N, R]`` float64.

    Parameters
    ----------
    rows, places
        ``[R]`` and ``[N]`` int64: positions of the queries and of the keys.
    frequencies
        ``[d / 2]``: angular frequencies of the rotary embedding. Without any the result is one everywhere.
    """
    if not len(frequencies):
        return torch.ones(len(places), len(rows), dtype=torch.float64, device=places.device)
    query, key = (x.double()[:, None] * frequencies.double() for x in (rows, places))
    cosines = key.cos() @ query.cos().T + key.sin() @ query.sin().T
    found: Tensor = cosines * (2 / (2 * len(frequencies)) ** 0.5)
    return found


def priority_scores(attention: Tensor, raters: Tensor, pull: Tensor) -> Tensor:
    """Return what raters attend to in the heads that attend most to the image, ``[N]`` float32.

    Parameters
    ----------
    attention
        ``[N, H, R]``: of each row and head.
    raters
        ``[R]`` bool: the rows that count.
    pull
        ``[N, R]``: by what the attention is divided, see `gravity`.
    """
    heads = attention.shape[1]
    weight = (raters / raters.sum()) / pull
    received = (attention * weight.float()[:, None]).sum(dim=2)
    best = ranking.descending(received.sum(dim=0)[None])[0, : math.ceil(14 / 32 * heads)]
    return received.index_select(1, best).mean(dim=1)
