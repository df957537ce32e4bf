"""SGL: one cut inside a large model, by the attention that visual tokens get in a small one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@register("sgl")
@dataclass(frozen=True)
class SGL(InLlmReducer):
    """SGL (arXiv 2412.03324): a small model answers first, and its attention ranks the tokens of a large one.

    The score of a visual token is the attention that it gets in all layers and heads of the small model, summed over
    the row of the last visual token, the prompt's text behind it, and the tokens of the answer. The large model drops
    at one boundary the tokens that score least. `foveate.guide` runs both models; any other scores go in by
    `Handle.scored`.

    Parameters
    ----------
    keep
        The budget; of several images the sum of their budgets, for which all their tokens compete. A share of the
        tokens is rounded down, to one at least.
    depth
        The share p of the large model's layers that run with all tokens: the first ``int(p * layers)`` of them.
    layer
        Instead of `depth`: the first layer that runs without the dropped tokens, counted from 0.
    equivalent
        Instead of `keep`: how many tokens per image (or which share) the layers receive on average.
    include_last_visual
        Whether the row of the last visual token counts as well, as in the authors' code, which gave the published
        results; the paper sums over the text alone, which keeps 89 % of the same 64 tokens on scenes of nano.
    normalise
        Take the mean over rows of the prompt and that over rows of the answer, and the mean of both, so that long
        answers do not outweigh the prompt.
    consistency_keep
        Share of the tokens, before the LLM, with which the small model must confirm its answer.
    geometric
        Take the geometric mean of the answer's probabilities for the consistency as well; their product, as published,
        comes to nothing for long answers.

    Notes
    -----
    The rows of the answer are those of all its tokens but the last, which the small model never reads.
    """

    keep: Keep | None = None
    depth: float = 0.3
    layer: int | None = None
    equivalent: int | float | None = None
    include_last_visual: bool = True
    normalise: bool = False
    consistency_keep: float = 0.05
    geometric: bool = False

    needs = (probes.Prior(),)
    guided = True
    paper = "arXiv:2412.03324"
    complexity = "O(N log N)"

    def __post_init__(self) -> None:
        if self.keep is None and self.equivalent is None:
            object.__setattr__(self, "keep", 0.3)
        super().__post_init__()
        if self.equivalent is not None:
            schedules.check_equivalent(self.name, self.keep, self.equivalent)
        if self.layer is not None:
            schedules.check_layers(self.name, (self.layer,))
        if not 0.0 < self.depth < 1.0:
            raise FoveateError(f"depth is a share of the layers between 0 and 1, such as 0.3, not {self.depth!r}")
        if not 0.0 < self.consistency_keep <= 1.0:
            raise BudgetError(f"consistency_keep is a share of the tokens such as 0.05, not {self.consistency_keep!r}")

    def boundaries(self, depth: int) -> Sequence[int]:
        return (schedules.boundary_in(depth, int(depth * self.depth) if self.layer is None else self.layer, self.name),)

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        if self.equivalent is None and isinstance(self.keep, float):
            return (share_of(self.keep, schedules.tokens_of(images)),)
        (boundary,) = self.boundaries(depth)
        return (schedules.one_cut(self.name, self.keep, self.equivalent, boundary, depth, images),)

    def select(self, tokens: LayerTokens) -> Selection:
        return tokens.per_prompt(lambda prompts, count: ranking.top(prompts.probe(probes.Prior()), count))


def share_of(share: float, tokens: int) -> int:
    """Return a share of some tokens, rounded down, but one at least if there are any."""
    return min(max(math.floor(tokens * share + 1e-9), 1), tokens)
