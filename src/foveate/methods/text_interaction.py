"""2409.01162-style pruning: a knee in the similarity to ``[CLS]``, then attention of the text inside the LLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.author import (
    BudgetError,
    CropBatch,
    FoveateError,
    Images,
    InLlmReducer,
    Keep,
    LayerTokens,
    Method,
    Reducer,
    Selection,
    StagedReducer,
    VisualTokens,
    budget,
    probes,
    ranking,
    register,
    schedules,
)

Similarity = Literal["cosine", "attention"]


@register("text_interaction_image")
@dataclass(frozen=True)
class TextInteractionImage(Reducer):
    """Stage 1 of `TextInteraction`: the tokens in front of the knee in the curve of similarity to ``[CLS]``.

    Parameters
    ----------
    keep
        The budget; with `adaptive` an upper bound.
    adaptive
        Keep the tokens in front of the knee, whose number depends on the image. Waits for the device once per batch,
        and so does not compile to one graph.
    least
        With `adaptive`, the smallest share of a crop's tokens that stays.
    inclusive
        Whether the token at the knee stays.
    similarity
        ``"cosine"`` of the features that the projector reads, or ``"attention"`` of ``[CLS]`` in the layer of these.

    Notes
    -----
    The cosine may rank background first, where encoders store what concerns the whole image: on `nano` the attention
    serves better. Where the curve has no knee (straight or concave), all tokens count as in front of it. Each crop has
    its own curve, with joint budgets all crops of an image together. See `TextInteraction`.
    """

    adaptive: bool = True
    least: float = 0.05
    inclusive: bool = False
    similarity: Similarity = "cosine"

    paper = "arXiv:2409.01162"
    complexity = "O(N (C + log N))"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.least <= 1.0:
            raise FoveateError(f"least is a share of the tokens from 0 to 1, not {self.least!r}")

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return (probes.ClsSimilarity() if self.similarity == "cosine" else probes.Attention(),)

    def select(self, tokens: VisualTokens) -> Selection:
        if not self.adaptive:
            return tokens.per_crop(self.keep, self._pick)
        (probe,), first, parts = self.needs, 0, []
        for i, span in enumerate(tokens.spans):
            own = list(zip(span.crops, tokens.probe(probe)[first:], strict=False))
            first += len(own)
            joint = budget.resolve(self.keep, span.kind, span.ordinal).per == "joint"
            for unit, most in zip([own] if joint else [[pair] for pair in own], span.budget(self.keep), strict=True):
                index = torch.cat([crop.index for crop, _ in unit]).to(tokens.device)
                order = ranking.descending(torch.cat([scores for _, scores in unit])[None])[0]
                scores = torch.cat([scores for _, scores in unit]).index_select(0, order)
                parts.append((i, index.index_select(0, order), knee(scores, self.inclusive), most))
        fronts = torch.stack([front for *_, front, _ in parts]).tolist() if parts else []
        kept: dict[int, list[Tensor]] = {}
        for (i, ranked, _, most), front in zip(parts, fronts, strict=True):
            kept.setdefault(i, []).append(ranked[: min(max(front, math.ceil(self.least * len(ranked))), most)])
        return tokens.selection(kept)

    def _pick(self, crops: CropBatch, count: int) -> Tensor:
        (probe,) = self.needs
        return ranking.top(crops.probe(probe), count)


@register("text_interaction_llm")
@dataclass(frozen=True)
class TextInteractionLLM(InLlmReducer):
    """Stage 2 of `TextInteraction`: the tokens that the text behind the image attends to in an early layer.

    Parameters
    ----------
    keep
        The share of its visual tokens that the LLM keeps, rounded up.
    layer
        The first layer that runs without the dropped tokens, counted from 0 (UNVERIFIED).
    equivalent
        Instead of `keep`: how many tokens per image (or which share) the layers receive on average.

    Notes
    -----
    Without text behind the image the attention of the last token counts. Text is never dropped. See `TextInteraction`.
    """

    keep: float | None = None
    layer: int = 2
    equivalent: int | float | None = None

    needs = (probes.LayerAttention("text"),)
    paper = "arXiv:2409.01162"
    complexity = "O(M S D + N log N)"

    def __post_init__(self) -> None:
        schedules.check_equivalent(self.name, self.keep, self.equivalent)
        if self.keep is not None and (not isinstance(self.keep, float) or not 0.0 < self.keep <= 1.0):
            raise BudgetError(f"text_interaction_llm keeps a share of the tokens, such as 0.4, not {self.keep!r}")
        if type(self.layer) is not int or self.layer < 1:
            raise FoveateError(f"text_interaction needs a layer in front of the cut: not layer={self.layer!r}")

    def boundaries(self, depth: int) -> Sequence[int]:
        return (schedules.boundary_in(depth, self.layer, self.name),)

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        if self.keep is not None and self.equivalent is None:
            return (math.ceil(self.keep * schedules.tokens_of(images) - 1e-9),)
        return (schedules.one_cut(self.name, self.keep, self.equivalent, self.layer, depth, images),)

    def select(self, tokens: LayerTokens) -> Selection:
        (attention,) = self.needs
        return tokens.per_prompt(lambda prompts, count: ranking.top(prompts.probe(attention), count))


@register("text_interaction")
@dataclass(frozen=True)
class TextInteraction(StagedReducer):
    """2409.01162-style pruning: the head of a long-tailed curve before the LLM, what the text asks for inside it.

    Only the abstract of the paper (arXiv 2409.01162, "Balancing Performance and Efficiency: ... Pruning Method based
    Image Text Interaction") was public. From it come the curve of similarities to ``[CLS]``, its inflection point,
    which gives each image a number of tokens of its own, and a second step by correlation with the text; all else
    is UNVERIFIED and ours: no reproduction.

    Parameters
    ----------
    keep
        `None`: as many tokens as the knee asks for, then the share `ratio` of them. Else the mean number of tokens per
        image over the layers, or their share: one and a half times as many enter the LLM, and the cut inside it makes
        up for that.
    layer
        The first layer that runs without what the second stage drops, counted from 0.
    ratio
        Without `keep`, the share that the second stage keeps. The default comes to the 22 % of the abstract where the
        knee leaves half of the tokens.
    least, most
        Without `keep`, bounds on the share of a crop's tokens that the first stage keeps.
    similarity
        See `TextInteractionImage`.

    Notes
    -----
    The knee is the first point furthest below the chord of the sorted curve, the tokens in front of it stay. The
    concatenated sequence that the abstract speaks of is cut in its visual tokens only.
    """

    keep: Keep | None = None
    layer: int = 2
    ratio: float = 0.4
    least: float = 0.05
    most: float = 0.6
    similarity: Similarity = "cosine"

    paper = "arXiv:2409.01162"
    complexity = "O(N (C + log N) + M S D)"

    def __post_init__(self) -> None:
        if self.keep is not None:
            super().__post_init__()
            if not isinstance(self.keep, int | float):
                raise BudgetError(f"text_interaction has one budget for all images: 64 or 0.25, not {self.keep!r}")
        if not 0.0 <= self.least <= self.most:
            raise FoveateError(f"bounds are 0 <= least <= most, not least={self.least}, most={self.most}")
        self.stages()

    def stages(self) -> tuple[Method, ...]:
        if self.keep is None:
            first = TextInteractionImage(float(self.most), least=self.least, similarity=self.similarity)
            return first, TextInteractionLLM(float(self.ratio), layer=self.layer)
        assert isinstance(self.keep, int | float)
        entering = min(1.5 * self.keep, 1.0) if isinstance(self.keep, float) else round(1.5 * self.keep)
        mean = self.keep / entering if isinstance(self.keep, float) else self.keep
        first = TextInteractionImage(entering, adaptive=False, similarity=self.similarity)
        return first, TextInteractionLLM(layer=self.layer, equivalent=mean)


def knee(curve: Tensor, inclusive: bool = False) -> Tensor:
    """Return how many values of a descending curve ``[N]`` lie in front of its knee, int64.

    Parameters
    ----------
    inclusive
        Whether the value at the knee counts.

    Returns
    -------
    Tensor
        Scalar: the first index where the curve is furthest below its chord, or N if it nowhere is.
    """
    size, y = len(curve), curve.double()
    if size < 3:
        return torch.tensor(size, device=curve.device)
    spread = y[0] - y[-1]
    gap = 1 - torch.linspace(0, 1, size, dtype=y.dtype, device=y.device) - (y - y[-1]) / spread
    place = torch.arange(size, device=y.device)
    first = torch.where(gap == gap.amax(), place, size).amin() + int(inclusive)
    return torch.where((spread > ranking.RESOLUTION) & (gap.amax() > ranking.RESOLUTION), first, size)
