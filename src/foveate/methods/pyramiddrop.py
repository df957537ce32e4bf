"""PyramidDrop: a share of the tokens dropped at each of several depths, by what the last token would attend to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from foveate.author import (
    BudgetError,
    Images,
    InLlmReducer,
    LayerTokens,
    Selection,
    probes,
    ranking,
    register,
    schedules,
)

QUARTERS = (1 / 4, 2 / 4, 3 / 4)


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(InLlmReducer):
    """PyramidDrop (arXiv 2410.17247): the LLM in stages, each with a share of the visual tokens of the one before.

    At each boundary the query of the prompt's last token and the keys of all tokens, as the layer behind the boundary
    projects them, give the attention by which tokens are ranked, averaged over heads. Counts are rounded down.

    Parameters
    ----------
    keep
        The share of its visual tokens that each stage hands on, the paper's lambda.
    layers
        The first layer of each further stage, counted from 0; by default those at 1/4, 2/4 and 3/4 of the depth, which
        is the paper's 8, 16 and 24 of 32.
    equivalent
        Instead of `keep`: how many tokens per image (or which share) the layers receive on average. The share of each
        stage follows by bisection.

    Notes
    -----
    Deviations from the paper: it states no settings for averages below 144 of 576 tokens, which its boundaries cannot
    reach; `layers` can, and `equivalent` then solves for the share. With several images their tokens compete.
    """

    keep: float | None = None
    layers: tuple[int, ...] | None = None
    equivalent: int | float | None = None

    needs = (probes.LayerAttention("last", ahead=True),)
    budgets = ("keep", "equivalent")
    positions = "compact"
    paper = "arXiv:2410.17247"
    complexity = "O(S D^2) per boundary"

    def __post_init__(self) -> None:
        if self.keep is None and self.equivalent is None:
            object.__setattr__(self, "keep", 0.5)
        schedules.check_equivalent(self.name, self.keep, self.equivalent)
        if self.keep is not None and (not isinstance(self.keep, float) or not 0.0 < self.keep <= 1.0):
            raise BudgetError(
                f"pyramiddrop keeps a share of the tokens from stage to stage, such as 0.5, not {self.keep!r}; for a "
                "number of tokens use equivalent=, their mean over the layers"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", schedules.check_layers(self.name, self.layers))

    def boundaries(self, depth: int) -> Sequence[int]:
        layers = self.layers or schedules.after_shares(depth, QUARTERS)
        return tuple(schedules.boundary_in(depth, layer, self.name) for layer in layers)

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        share = self.keep if self.equivalent is None else self._share(depth, images)
        assert share is not None
        if self.keep is not None and abs(self.keep - share) > 1e-4:
            raise BudgetError(
                f"pyramiddrop: keep={self.keep} and equivalent={self.equivalent} contradict each other, as the latter "
                f"makes the share {share:.4f}: leave one of them out"
            )
        return _stages(schedules.tokens_of(images), share, len(self.boundaries(depth)))[1:]

    def _share(self, depth: int, images: Images) -> float:
        given, wanted = schedules.tokens_of(images), schedules.wanted_tokens(self.equivalent or 0, images)
        borders = (0, *self.boundaries(depth), depth)
        widths = [after - before for before, after in pairwise(borders)]
        if wanted < given * widths[0] / depth:
            raise BudgetError(
                f"pyramiddrop with layers {tuple(borders[1:-1])} cannot come down to {wanted:g} tokens per layer: the "
                f"first {widths[0]} of {depth} layers alone receive {given * widths[0] / depth:g} on average; use "
                "earlier layers"
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            counts = _stages(given, middle, len(widths) - 1)
            mean = sum(width * count for width, count in zip(widths, counts, strict=True)) / depth
            low, high = (middle, high) if mean < wanted else (low, middle)
        return high

    def solved(self, depth: int, tokens: int) -> PyramidDrop:
        """Return the same method with the share `keep` that `equivalent` comes to for an image of so many tokens."""
        return self if self.equivalent is None else replace(self, keep=self._share(depth, [("image", tokens)]))

    def select(self, tokens: LayerTokens) -> Selection:
        (attention,) = self.needs
        return tokens.per_prompt(lambda prompts, count: ranking.top(prompts.probe(attention), count))


def _stages(given: int, share: float, further: int) -> list[int]:
    """Return the tokens of each stage, the first one included."""
    return [math.floor(given * share**stage + 1e-9) for stage in range(further + 1)]
