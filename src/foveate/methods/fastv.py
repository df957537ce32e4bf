"""FastV: the tokens that the last token of the prompt attends to in an early layer of the LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from foveate.author import (
    BudgetError,
    FoveateError,
    Images,
    InLlmReducer,
    Keep,
    LayerTokens,
    Selection,
    probes,
    ranking,
    register,
    schedules,
)


@register("fastv")
@dataclass(frozen=True)
class FastV(InLlmReducer):
    """FastV (arXiv 2403.06764): one cut behind the first layers of the LLM, by the attention of the last of them.

    Parameters
    ----------
    keep
        The budget; of several images the sum of their budgets, for which all their tokens compete unless `per_image`.
    layer
        The first layer that runs without the dropped tokens, counted from 0: the paper's K.
    query
        Whose attention in layer ``layer - 1`` ranks the tokens, averaged over heads: that of the ``"last"`` token of
        the prompt, of the ``"text"`` behind the last image, or of ``"all"`` tokens.
    equivalent
        Instead of `keep`: how many tokens per image (or which share) the layers receive on average.
    per_image
        Images do not compete: each has a part of the sum of the budgets, in proportion to its tokens.

    Notes
    -----
    Deviations from the paper: its text averages over all queries, its code takes the last one, which is the default
    here. With ``layer=0`` its code drops at random; use ``Random`` for that.
    """

    keep: Keep | None = None
    layer: int = 2
    query: Literal["last", "text", "all"] = "last"
    equivalent: int | float | None = None
    per_image: bool = False

    budgets = ("keep", "equivalent")
    paper = "arXiv:2403.06764"
    complexity = "O(S D + N log N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        schedules.check_equivalent(self.name, self.keep, self.equivalent)
        if self.layer < 1:
            raise FoveateError(f"fastv needs a layer in front of the cut: layer is at least 1, not {self.layer!r}")
        if self.per_image and isinstance(self.keep, Sequence | Mapping):
            raise BudgetError(
                f"per_image divides one budget in proportion to the tokens of the images, not keep={self.keep!r}: give "
                "one for all, or leave per_image out"
            )

    @property
    def unit(self) -> Literal["prompt", "image", "crop"]:
        return "image" if self.per_image else "prompt"

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return (probes.LayerAttention(self.query),)

    def boundaries(self, depth: int) -> Sequence[int]:
        return (schedules.boundary_in(depth, self.layer, self.name),)

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        return (schedules.one_cut(self.name, self.keep, self.equivalent, self.layer, depth, images),)

    def solved(self, depth: int, tokens: int) -> FastV:
        """Return the same method with the count `keep` that `equivalent` comes to for an image of so many tokens."""
        return replace(self, keep=self.counts(depth, [("image", tokens)])[0]) if self.equivalent is not None else self

    def select(self, tokens: LayerTokens) -> Selection:
        (attention,) = self.needs
        return tokens.per_prompt(lambda prompts, count: ranking.top(prompts.probe(attention), count))
