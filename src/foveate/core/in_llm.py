"""Reducers that act inside the language model, between its layers, and what they see there."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from foveate.core.budget import Budget, resolve
from foveate.core.crops import CropBatch, Groups, grouped, picked
from foveate.core.errors import ContractError
from foveate.core.probes import LlmProbe, Probe
from foveate.core.reducer import Method, ModelFamily, Positions, Reducer, Stage, all_needs
from foveate.core.schedules import Images, tokens_of
from foveate.core.selection import Selection
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens, merged_selection

Unit: TypeAlias = Literal["prompt", "image", "crop"]


@dataclass(frozen=True, eq=False)
class LayerTokens(VisualTokens):
    """Visual tokens at a boundary between two decoder layers.

    The visual tokens of a prompt, of all its images together, form one span; its crops are the sets that a method
    selects from (see `InLlmReducer.unit`). Prompts without visual tokens are left out.

    Attributes
    ----------
    boundary
        The index of the layer that the tokens are about to enter.
    depth
        Number of decoder layers.
    counts
        Per prompt how many tokens are to be left, by `InLlmReducer.counts`.
    images
        Per prompt the images that the LLM was given.
    origin
        Per prompt ``[n]`` int64: which of the tokens that the LLM was given each one is.
    places
        Per prompt ``[n]`` int64: the column of each token among those that the LLM was given, text included.
    rows
        Per prompt ``[R]`` int64: the columns of the rows that `LayerAttention` reads with ``over="nothing"``.
    judging
        Per prompt which of these rows `InLlmReducer.judges` chose, ``[R]`` bool, if a probe asks for it.
    behind
        Per prompt how many tokens of text follow the last image.
    text
        Per prompt the hidden states ``[M, D]`` of the text behind the last image, at the boundary.
    text_before
        The same where they go into the layer in front of the boundary.
    frequencies
        ``[d / 2]``: angular frequencies of the rotary embedding in front of the boundary; empty if there is none.
    """

    boundary: int = 0
    depth: int = 0
    counts: tuple[int, ...] = ()
    images: tuple[Images, ...] = ()
    origin: tuple[Tensor, ...] = ()
    places: tuple[Tensor, ...] = ()
    rows: tuple[Tensor, ...] = ()
    judging: tuple[Tensor, ...] = ()
    behind: tuple[int, ...] = ()
    text: tuple[Tensor, ...] = ()
    text_before: tuple[Tensor, ...] = ()
    frequencies: Tensor = field(default_factory=lambda: torch.empty(0))

    def per_prompt(self, pick: Callable[[CropBatch, int], Tensor]) -> Selection:
        """Select `counts` tokens of each prompt among its crops, those of equal size and count at once.

        Crops are divided a prompt's count in proportion to their sizes; without another `InLlmReducer.unit` there is
        one, of all its tokens.

        Parameters
        ----------
        pick
            Maps a `CropBatch` of B crops of n tokens and a count T to the kept tokens, ``[B, T]`` int64 in any order.
            Crops that keep all of their tokens, or none, are not shown to it.
        """
        kept: dict[int, list[Tensor]] = defaultdict(list)
        for share in self._shares():
            if share.settled and share.count:
                kept[share.prompt].append(share.index)
        for shares, batch, count in self._stacked():
            for share, row in zip(shares, picked(pick(batch, count), batch, count), strict=True):
                kept[share.prompt].append(share.index.index_select(0, row))
        return self.selection(kept)

    def per_prompt_merge(self, pick: Callable[[CropBatch, int], Groups]) -> Selection:
        """Merge within the crops of each prompt, as `per_prompt` selects; `pick` returns the `Groups` of its crops."""
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = defaultdict(list)
        merged = set()
        for share in self._shares():
            if share.settled and share.count:
                own = torch.arange(len(share.index), device=self.device)
                weight = torch.ones(len(own), device=self.device)
                parts[share.prompt].append((share.index, own, share.index, weight))
        for shares, batch, count in self._stacked():
            groups = grouped(pick(batch, count), batch, count)
            for share, (kept, target, source, weight) in zip(shares, groups.per_crop(), strict=True):
                index = share.index
                parts[share.prompt].append((index.index_select(0, kept), target, index.index_select(0, source), weight))
                merged.add(share.prompt)
        return Selection(
            tuple(merged_selection(span, parts[i], i in merged, self.device) for i, span in enumerate(self.spans))
        )

    def _shares(self) -> list[_Share]:
        """Divide the count of each prompt among its crops."""
        shares: list[_Share] = []
        for i, (span, count) in enumerate(zip(self.spans, self.counts, strict=True)):
            sizes = [len(crop) for crop in span.crops]
            parts = Budget(count).split(sizes) if count else [0] * len(sizes)
            for crop, part in zip(span.crops, parts, strict=True):
                shares.append(_Share(i, len(shares), crop.index.to(self.device, non_blocking=True), part))
        return shares

    def _stacked(self) -> list[tuple[list[_Share], CropBatch, int]]:
        alike: dict[Any, list[_Share]] = defaultdict(list)
        for share in self._shares():
            if not share.settled:
                rows = len(self.rows[share.prompt]) if self.rows else 0
                alike[len(share.index), share.count, rows].append(share)
        stacks = []
        for (size, count, _), shares in alike.items():
            planes = {probe: torch.stack([x[share.crop] for share in shares]) for probe, x in self.planes.items()}
            stacks.append((shares, CropBatch(None, (0,) * len(shares), size, self.device, planes), count))
        return stacks


@dataclass(frozen=True, eq=False)
class _Share:
    """What a crop of a prompt keeps: `crop` counts through all prompts, `index` are its tokens among the prompt's."""

    prompt: int
    crop: int
    index: Tensor
    count: int

    @property
    def settled(self) -> bool:
        return self.count == 0 or self.count >= len(self.index)


@dataclass(frozen=True)
class InLlmReducer(Method):
    """A method that drops or merges visual tokens between layers of the LLM, once or several times.

    Its author writes `boundaries` and `counts`, which say where and how many tokens are left, and `select`, which is
    called at each boundary with `LayerTokens`. A boundary b lies in front of layer b, counted from 0: the layers
    0 to b - 1 hold the tokens that are dropped there, in their computation and in the KV cache.
    """

    stage: ClassVar[Stage] = "in_llm"
    positions: ClassVar[Positions] = "original"

    @property
    def unit(self) -> Unit:
        """What the crops of `LayerTokens` are: all tokens of a prompt, those of each image, or the family's crops with
        their grids, whose separators always stay."""
        return "prompt"

    @abstractmethod
    def boundaries(self, depth: int) -> Sequence[int]:
        """Return where tokens are dropped, ascending, in an LLM with `depth` layers."""

    @abstractmethod
    def counts(self, depth: int, images: Images) -> Sequence[int]:
        """Return how many visual tokens of a prompt are left behind each boundary; of adaptive methods, at least.

        Parameters
        ----------
        depth
            Number of decoder layers.
        images
            The images of the prompt.
        """

    @abstractmethod
    def select(self, tokens: LayerTokens) -> Selection:
        """Decide which tokens of each prompt stay at a boundary."""

    def judges(self, visual: Tensor, text: Tensor) -> Tensor:
        """Choose the text tokens whose attention counts, for ``LayerAttention(rows="judges")``.

        Parameters
        ----------
        visual, text
            ``[N, D]`` and ``[M, D]``: what the LLM was given for the visual tokens of a prompt and for the text
            behind them.

        Returns
        -------
        Tensor
            ``[M]`` bool.
        """
        raise ContractError(
            f"{self.name} needs the attention of judges, and has no judges(visual, text) to choose them"
        )

    def prior(self, tokens: VisualTokens) -> list[Tensor]:
        """Return a score of each token of each crop before the LLM, ``[n]`` each, for the probe `Prior`."""
        raise ContractError(f"{self.name} needs Prior(), and has no prior(tokens) to make it")

    def solved(self, depth: int, tokens: int) -> InLlmReducer:
        """Return the same method with the `keep` that `equivalent` comes to for an image of so many tokens, if any."""
        return self

    def keeps_all(self, spans: Sequence[Span]) -> bool:
        """Return whether no boundary drops anything; what the method sees depends on the LLM, not on spans alone."""
        return False


@dataclass(frozen=True)
class StagedReducer(Method):
    """A method with stages before and inside the LLM; its author writes `stages`."""

    stage: ClassVar[Stage] = "in_llm"

    @abstractmethod
    def stages(self) -> tuple[Method, ...]:
        """Return the method of each stage."""

    @property
    def needs(self) -> tuple[Probe, ...]:
        return all_needs(self)

    def check(self, model: Any, family: ModelFamily) -> None:
        for part in self.stages():
            part.check(model, family)

    def keeps_all(self, spans: Sequence[Span]) -> bool:
        return all(reducer.keeps_all(spans) for reducer in self.stages())


def of_encoder(method: Method) -> tuple[Probe, ...]:
    """Return what a method reads of the vision encoder and the prompt, before the LLM."""
    return tuple(probe for probe in method.needs if not isinstance(probe, LlmProbe))


def of_llm(method: Method) -> tuple[LlmProbe, ...]:
    """Return what a method reads inside the LLM."""
    return tuple(probe for probe in method.needs if isinstance(probe, LlmProbe))


def split(stages: Iterable[Method]) -> tuple[tuple[Reducer, ...], tuple[InLlmReducer, ...]]:
    """Tell the methods of a single stage that act before the LLM from those that act inside it."""
    parts = tuple(stages)
    before = tuple(part for part in parts if isinstance(part, Reducer))
    return before, tuple(part for part in parts if isinstance(part, InLlmReducer))


def tokens_per_layer(method: Method, depth: int, tokens: int) -> tuple[int, ...]:
    """Return how many visual tokens each of `depth` layers receives of one image of so many tokens.

    Of adaptive methods: at most so many.

    Raises
    ------
    BudgetError
        If the budget of a method before the LLM depends on what an image shows.
    """
    before, inside = split(method.stages())
    for part in before:
        tokens = resolve(part.keep, "image", 0).count(tokens)
    return tokens_in_layers(inside, depth, [("image", tokens)])


def solved(method: Method, depth: int, images: Sequence[int]) -> Method:
    """Return a method as reports name it: with the `keep` that its `equivalent` comes to for the only image."""
    return method.solved(depth, images[0]) if isinstance(method, InLlmReducer) and len(images) == 1 else method


def cuts(reducer: InLlmReducer, depth: int) -> tuple[int, ...]:
    """Return the boundaries of a method in an LLM of `depth` layers.

    Raises
    ------
    ContractError
        If these are not ascending, or not all between two layers.
    """
    boundaries = reducer.boundaries(depth)
    found = tuple(boundaries) if isinstance(boundaries, Sequence) else ()
    if not isinstance(boundaries, Sequence) or any(
        type(b) is not int or not a < b < depth for a, b in pairwise((0, *found))
    ):
        raise ContractError(
            f"{reducer.name}.boundaries({depth}) returns {boundaries!r}, where whole numbers are due that ascend from "
            f"1 to at most {depth - 1}: the layers in front of which tokens are dropped"
        )
    return found


def _counts(reducer: InLlmReducer, depth: int, images: Images, boundaries: Sequence[int]) -> tuple[int, ...]:
    counts, given = reducer.counts(depth, images), tokens_of(images)
    found = tuple(counts) if isinstance(counts, Sequence) else ()
    if len(found) != len(boundaries) or any(type(n) is not int or n < 0 for n in found):
        raise ContractError(
            f"{reducer.name}.counts({depth}, ...) returns {counts!r} of {given} tokens, where one whole number is due "
            f"for each of the boundaries {list(boundaries)}: the tokens that are left behind it"
        )
    return found


def planned(reducers: Sequence[InLlmReducer], depth: int, images: Images) -> list[dict[int, int]]:
    """Return for each method how many tokens of a prompt are left behind each of its boundaries.

    Each counts from what the one before it has left of the images, in proportion to their sizes; of adaptive methods,
    which leave at least what is returned, from all that they may leave.
    """
    plans: list[dict[int, int]] = []
    for reducer in reducers:
        boundaries, given = cuts(reducer, depth), tokens_of(images)
        counts = _counts(reducer, depth, images, boundaries) if given else (0,) * len(boundaries)
        plans.append(dict(zip(boundaries, counts, strict=True)))
        if not reducer.adaptive and (left := min((given, *counts))) < given:
            sizes = Budget(left).split([n for _, n in images]) if left else [0] * len(images)
            images = [(kind, n) for (kind, _), n in zip(images, sizes, strict=True)]
    return plans


def tokens_in_layers(reducers: Sequence[InLlmReducer], depth: int, images: Images) -> tuple[int, ...]:
    """Return how many visual tokens of a prompt each layer receives; of adaptive methods, at most so many."""
    behind: dict[int, int] = {}
    for reducer, plan in zip(reducers, planned(reducers, depth, images), strict=True):
        if not reducer.adaptive:
            behind |= plan
    given = tokens_of(images)
    return tuple(accumulate((behind.get(layer, given) for layer in range(depth)), min))
