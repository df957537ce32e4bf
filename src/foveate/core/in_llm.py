"""Reducers that act inside the language model, between its layers, and what they see there."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from foveate.core.budget import Budget, Keep, is_number, resolve
from foveate.core.errors import BudgetError, FoveateError, UnsupportedModelError
from foveate.core.probes import LlmProbe, Probe
from foveate.core.reducer import Reducer, Stage, check_fields, split
from foveate.core.selection import Selection
from foveate.core.tokens import CropBatch, Groups, VisualTokens, merged_selection

if TYPE_CHECKING:
    from foveate.families import Family

Rows: TypeAlias = Literal["last", "text", "judges", "visual", "all"]
Images: TypeAlias = Sequence[tuple[str, int]]
"""The kind and the number of tokens of each image or video of a prompt."""


@dataclass(frozen=True)
class LayerAttention(LlmProbe):
    """Attention that visual tokens get in a decoder layer, softmax over all keys, float32.

    Parameters
    ----------
    rows
        Whose attention: that of the ``"last"`` token of the prompt, of the ``"text"`` behind the last image (without
        any, of the last token), of those among this text that `InLlmReducer.judges` chooses, of the ``"visual"``
        tokens themselves, or of ``"all"`` tokens.
    ahead
        False: of the layer in front of the boundary, as it ran. True: what the layer behind the boundary would have,
        from its projections of the hidden states at the boundary.
    over
        What is averaged over: ``"rows and heads"`` gives ``[n]`` per prompt, ``"rows"`` ``[n, H]``, ``"nothing"``
        ``[n, H, R]`` with the rows in their order.
    """

    rows: Rows = "last"
    ahead: bool = False
    over: Literal["rows and heads", "rows", "nothing"] = "rows and heads"


@dataclass(frozen=True)
class LayerKeys(LlmProbe):
    """Keys of visual tokens in the layer behind the boundary, rotated, mean over key heads, ``[n, d]`` float32."""


@dataclass(frozen=True)
class LayerStates(LlmProbe):
    """Hidden states of visual tokens ``[n, D]``.

    Parameters
    ----------
    at
        ``"output"``: at the boundary. ``"input"``: where they go into the layer in front of the boundary. ``"mlp"``:
        where they go into its feed-forward network.
    """

    at: Literal["output", "input", "mlp"] = "output"


@dataclass(frozen=True)
class Prior(LlmProbe):
    """What `InLlmReducer.prior` made of the tokens before the LLM, or another model of them, ``[n]`` float32."""


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
            for share, row in zip(shares, pick(batch, count), strict=True):
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
            for share, (kept, target, source, weight) in zip(shares, pick(batch, count).per_crop(), strict=True):
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
                shares.append(_Share(i, len(shares), crop.index.to(self.device), part))
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
class InLlmReducer(Reducer):
    """A method that drops or merges visual tokens between layers of the LLM, once or several times.

    Its author writes `boundaries` and `counts`, which say where and how many tokens are left, and `select`, which is
    called at each boundary with `LayerTokens`. A boundary b lies in front of layer b, counted from 0: the layers
    0 to b - 1 hold the tokens that are dropped there, in their computation and in the KV cache.
    """

    stage: ClassVar[Stage] = "in_llm"
    positions: ClassVar[Literal["original", "compact"]] = "original"
    reads: ClassVar[tuple[LlmProbe, ...]] = ()
    """Probes of the LLM that `select` reads; `needs` are those of the vision encoder, for `prior`."""
    reads_text: ClassVar[bool] = False
    """Whether `select` reads the hidden states of the text."""
    unit: ClassVar[Literal["prompt", "image", "crop"]] = "prompt"
    """What the crops of `LayerTokens` are: all tokens of a prompt, those of each image, or the family's crops with
    their grids, whose separators always stay."""
    adaptive: ClassVar[bool] = False
    """Whether `select` decides how many tokens stay, which makes the engine wait for the device."""

    def __post_init__(self) -> None:
        if self.keep is not None:
            super().__post_init__()
        else:
            check_fields(self)

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

    def cues(self) -> tuple[Probe, ...]:
        return (*self.probes(), *self.llm_probes())

    def llm_probes(self) -> tuple[LlmProbe, ...]:
        """Return the probes of the LLM that this configuration reads."""
        return self.reads

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
        raise NotImplementedError

    def prior(self, tokens: VisualTokens) -> list[Tensor]:
        """Return a score of each token of each crop before the LLM, ``[n]`` each, for the probe `Prior`."""
        raise NotImplementedError

    def solved(self, depth: int, tokens: int) -> InLlmReducer:
        """Return the same method with the `keep` that `equivalent` comes to for an image of so many tokens, if any."""
        return self

    def schedule(self, depth: int, tokens: int) -> tuple[int, ...]:
        """Return how many visual tokens each layer receives if the LLM is given one image of so many tokens.

        Of adaptive methods: at most so many.
        """
        return received([self], depth, [("image", tokens)])

    def keeps_all(self, spans: Any) -> bool:
        """Return whether no boundary drops anything; what the method sees depends on the LLM, not on spans alone."""
        return False


@dataclass(frozen=True)
class StagedReducer(Reducer):
    """A method with stages before and inside the LLM; its author writes `stages`."""

    stage: ClassVar[Stage] = "in_llm"

    @abstractmethod
    def stages(self) -> tuple[Reducer, ...]:
        """Return the method of each stage."""

    def cues(self) -> tuple[Probe, ...]:
        return tuple(dict.fromkeys(probe for part in self.stages() for probe in part.cues()))

    def check(self, model: Any, family: Family) -> None:
        for part in self.stages():
            part.check(model, family)

    def select(self, tokens: VisualTokens) -> Selection:
        raise FoveateError(f"{self.name} selects stage by stage: use foveate.attach(model, ...)")

    def keeps_all(self, spans: Any) -> bool:
        return all(reducer.keeps_all(spans) for reducer in self.stages())


def schedule(reducer: Reducer, depth: int, tokens: int) -> tuple[int, ...]:
    """Return how many visual tokens each of `depth` layers receives of one image of so many tokens.

    Of adaptive methods: at most so many.

    Raises
    ------
    BudgetError
        If the budget of a method before the LLM depends on what an image shows.
    """
    before, inside = split(reducer.stages())
    for part in before:
        tokens = resolve(part.keep, "image", 0).count(tokens)
    return received(inside, depth, [("image", tokens)])  # type: ignore[arg-type]


def solved(reducer: Reducer, depth: int, images: Sequence[int]) -> Reducer:
    """Return a method as reports name it: with the `keep` that its `equivalent` comes to for the only image."""
    return reducer.solved(depth, images[0]) if isinstance(reducer, InLlmReducer) and len(images) == 1 else reducer


def planned(reducers: Sequence[InLlmReducer], depth: int, images: Images) -> list[dict[int, int]]:
    """Return for each method how many tokens of a prompt are left behind each of its boundaries.

    Each counts from what the one before it has left of the images, in proportion to their sizes; of adaptive methods,
    which leave at least what is returned, from all that they may leave.
    """
    plans: list[dict[int, int]] = []
    for reducer in reducers:
        boundaries, given = reducer.boundaries(depth), tokens_of(images)
        counts = reducer.counts(depth, images) if given else (0,) * len(boundaries)
        plans.append(dict(zip(boundaries, counts, strict=True)))
        if not reducer.adaptive and (left := min((given, *counts))) < given:
            sizes = Budget(left).split([n for _, n in images]) if left else [0] * len(images)
            images = [(kind, n) for (kind, _), n in zip(images, sizes, strict=True)]
    return plans


def received(reducers: Sequence[InLlmReducer], depth: int, images: Images) -> tuple[int, ...]:
    """Return how many visual tokens of a prompt each layer receives; of adaptive methods, at most so many."""
    behind: dict[int, int] = {}
    for reducer, plan in zip(reducers, planned(reducers, depth, images), strict=True):
        if not reducer.adaptive:
            behind |= plan
    given = tokens_of(images)
    return tuple(accumulate((behind.get(layer, given) for layer in range(depth)), min))


def boundary_in(depth: int, boundary: int, name: str) -> int:
    """Return a boundary if the LLM has it.

    Raises
    ------
    UnsupportedModelError
        If it is not between two of `depth` layers.
    """
    if not 0 < boundary < depth:
        raise UnsupportedModelError(
            f"{name} drops tokens in front of layer {boundary}, but this LLM has the layers 0 to {depth - 1}: use a "
            f"layer from 1 to {depth - 1}"
        )
    return boundary


def budget_of(keep: Keep, images: Images) -> int:
    """Return how many tokens a budget leaves of the images of a prompt together.

    Raises
    ------
    BudgetError
        If the budget counts per crop.
    """
    budgets = [resolve(keep, kind, i) for i, (kind, _) in enumerate(images)]
    if any(budget.per == "crop" for budget in budgets):
        raise BudgetError("inside the LLM the tokens of all crops compete: give a budget per image, not per crop")
    return sum(budget.count(n) for budget, (_, n) in zip(budgets, images, strict=True))


def tokens_of(images: Images) -> int:
    """Return how many tokens the images of a prompt have together."""
    return sum(n for _, n in images)


def wanted_tokens(equivalent: int | float, images: Images) -> float:
    """Return the mean number of tokens per layer that an `equivalent` stands for: so many per image, or a share."""
    return equivalent * (tokens_of(images) if isinstance(equivalent, float) else len(images))


def one_cut(
    name: str, keep: Keep | None, equivalent: int | float | None, layer: int, depth: int, images: Images
) -> int:
    """Return how many tokens a method with a single cut in front of `layer` leaves of the images of a prompt.

    Raises
    ------
    BudgetError
        If the layers in front of the cut alone exceed the mean that `equivalent` asks for, or `keep` says otherwise.
    """
    if equivalent is None:
        assert keep is not None
        return budget_of(keep, images)
    given, wanted = tokens_of(images), wanted_tokens(equivalent, images)
    kept = round((depth * wanted - given * layer) / (depth - layer))
    if keep is not None and budget_of(keep, images) != min(kept, given):
        raise BudgetError(
            f"{name}: keep={keep!r} and equivalent={equivalent:g} contradict each other, as the latter leaves {kept} "
            f"of {given} tokens: leave one of them out"
        )
    if kept < 1:
        raise BudgetError(
            f"{name}(layer={layer}) cannot come down to {wanted:g} tokens per layer: the first {layer} of {depth} "
            f"layers alone receive {given * layer / depth:g} on average; use an earlier layer"
        )
    return min(kept, given)


def check_equivalent(name: str, keep: Keep | None, equivalent: int | float | None) -> None:
    """Raise `FoveateError` unless a method has either of `keep` and `equivalent`, and the latter makes sense."""
    if keep is None and equivalent is None:
        raise FoveateError(f"{name} needs a budget: keep=, or equivalent=, the mean number of tokens over the layers")
    if equivalent is None:
        return
    if not is_number(equivalent) or equivalent <= 0:
        raise BudgetError(f"equivalent is a mean number of tokens such as 64 or a share such as 0.25: {equivalent!r}")
    if isinstance(equivalent, float) and equivalent > 1.0:
        raise BudgetError(f"a share of {equivalent} is not in (0, 1]: pass a share such as 0.25, or a whole number")
