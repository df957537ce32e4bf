"""Reducers that act inside the language model, between its layers, and what they see there."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from foveate.budget import Keep, resolve
from foveate.errors import BudgetError, FoveateError, UnsupportedModelError
from foveate.probes import LlmProbe, Probe
from foveate.reducer import Reducer, Stage
from foveate.selection import Selection
from foveate.tokens import CropBatch, Groups, VisualTokens, merged_selection

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
    text
        Per prompt the hidden states ``[M, D]`` of the text behind the last image, at the boundary.
    text_before
        The same where they go into the layer in front of the boundary.
    frequencies
        ``[d / 2]``: angular frequencies of the rotary embedding.
    """

    boundary: int = 0
    depth: int = 0
    counts: tuple[int, ...] = ()
    images: tuple[Images, ...] = ()
    origin: tuple[Tensor, ...] = ()
    places: tuple[Tensor, ...] = ()
    rows: tuple[Tensor, ...] = ()
    judging: tuple[Tensor, ...] = ()
    text: tuple[Tensor, ...] = ()
    text_before: tuple[Tensor, ...] = ()
    frequencies: Tensor = field(default_factory=lambda: torch.empty(0))

    def per_prompt(self, pick: Callable[[CropBatch, int], Tensor]) -> Selection:
        """Select `counts` among all tokens of each prompt, prompts of equal size and count at once.

        Parameters
        ----------
        pick
            Maps a `CropBatch` of B prompts of n tokens and a count T to the kept tokens, ``[B, T]`` int64 in any order.
            Prompts that keep all of their tokens, or none, are not shown to it.
        """
        kept = {i: [torch.arange(n if k else 0, device=self.device)] for i, n, k in self._settled()}
        for prompts, batch, count in self._stacked():
            for i, row in zip(prompts, pick(batch, count), strict=True):
                kept[i] = [row]
        return self.selection(kept)

    def per_prompt_merge(self, pick: Callable[[CropBatch, int], Groups]) -> Selection:
        """Merge among all tokens of each prompt; `pick` returns the `Groups` of its prompts."""
        parts: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        for i, n, count in self._settled():
            own = torch.arange(n if count else 0, device=self.device)
            parts[i] = (own, own, own, torch.ones(len(own), device=self.device))
        merged = set()
        for prompts, batch, count in self._stacked():
            for i, part in zip(prompts, pick(batch, count).per_crop(), strict=True):
                parts[i] = part
                merged.add(i)
        return Selection(
            tuple(merged_selection(span, [parts[i]], i in merged, self.device) for i, span in enumerate(self.spans))
        )

    def _settled(self) -> list[tuple[int, int, int]]:
        sizes = [len(span) for span in self.spans]
        return [(i, n, k) for i, (n, k) in enumerate(zip(sizes, self.counts, strict=True)) if k >= n or k == 0]

    def _stacked(self) -> list[tuple[list[int], CropBatch, int]]:
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, (span, count) in enumerate(zip(self.spans, self.counts, strict=True)):
            if 0 < count < len(span):
                rows = len(self.rows[i]) if self.rows else 0
                alike[len(span), count, rows].append(i)
        stacks = []
        for (size, count, _), prompts in alike.items():
            planes = {probe: torch.stack([plane[i] for i in prompts]) for probe, plane in self.planes.items()}
            stacks.append((prompts, CropBatch(None, (0,) * len(prompts), size, self.device, planes), count))
        return stacks


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

    def schedule(self, depth: int, tokens: int) -> tuple[int, ...]:
        """Return how many visual tokens each layer receives if the LLM is given one image of so many tokens.

        Of adaptive methods: at most so many.
        """
        if self.adaptive:
            return (tokens,) * depth
        behind = dict(zip(self.boundaries(depth), self.counts(depth, [("image", tokens)]), strict=True))
        received, left = [], tokens
        for layer in range(depth):
            left = min(left, behind.get(layer, left))
            received.append(left)
        return tuple(received)

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
    received = (tokens,) * depth
    for part in reducer.stages():
        if isinstance(part, InLlmReducer):
            own = part.schedule(depth, tokens)
            received = tuple(map(min, received, own))
        else:
            tokens = resolve(part.keep, "image", 0).count(tokens)
            received = (tokens,) * depth
    return received


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
    """Return how many tokens a budget leaves of the images of a prompt together."""
    return sum(resolve(keep, kind, i).count(n) for i, (kind, n) in enumerate(images))


def tokens_of(images: Images) -> int:
    """Return how many tokens the images of a prompt have together."""
    return sum(n for _, n in images)


def wanted_tokens(equivalent: int | float, images: Images) -> float:
    """Return the mean number of tokens per layer that an `equivalent` stands for: so many per image, or a share."""
    return equivalent * (tokens_of(images) if isinstance(equivalent, float) else len(images))


def count_for_mean(equivalent: int | float, images: Images, boundary: int, depth: int, name: str) -> int:
    """Return how many tokens one cut must leave for the layers to receive `equivalent` tokens on average.

    Raises
    ------
    BudgetError
        If the layers in front of the boundary alone receive more.
    """
    given, wanted = tokens_of(images), wanted_tokens(equivalent, images)
    kept = round((depth * wanted - given * boundary) / (depth - boundary))
    if kept < 1:
        raise BudgetError(
            f"{name}(layer={boundary}) cannot come down to {wanted:g} tokens per layer: the first {boundary} of "
            f"{depth} layers alone receive {given * boundary / depth:g} on average; use an earlier layer"
        )
    return min(kept, given)


def check_equivalent(name: str, keep: Keep | None, equivalent: int | float | None) -> None:
    """Raise `FoveateError` unless a method has either of `keep` and `equivalent`, and the latter makes sense."""
    if keep is None and equivalent is None:
        raise FoveateError(f"{name} needs a budget: keep=, or equivalent=, the mean number of tokens over the layers")
    if equivalent is None:
        return
    if isinstance(equivalent, bool) or not isinstance(equivalent, int | float) or equivalent <= 0:
        raise BudgetError(f"equivalent is a mean number of tokens such as 64 or a share such as 0.25: {equivalent!r}")
    if isinstance(equivalent, float) and equivalent > 1.0:
        raise BudgetError(f"a share of {equivalent} is not in (0, 1]: pass a share such as 0.25, or a whole number")
