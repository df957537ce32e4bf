"""VisionDrop: dominant and contextual tokens, chosen by what visual tokens attend to, in the encoder and in the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from foveate.author import (
    CropBatch,
    Groups,
    Images,
    InLlmReducer,
    Keep,
    LayerTokens,
    Method,
    ModelFamily,
    Selection,
    StagedReducer,
    UnsupportedModelError,
    probes,
    register,
    schedules,
)
from foveate.methods.pyramiddrop import QUARTERS
from foveate.methods.visionzip import VisionZip, check_contextual_ratio, contextual_count, dominant_and_contextual

SEEN = probes.LayerAttention("visual", ahead=True)
FIRST = {"image": 1.5, "video": 3.0}


@register("visiondrop")
@dataclass(frozen=True)
class VisionDrop(VisionZip):
    """VisionDrop (arXiv 2506.22283, AAAI 2026), its stage 0: what it does at the output of the vision encoder.

    The rule is that of `VisionZip` with another share of contextual tokens. `VisionDropAll` goes on inside the LLM,
    as the published method does; with this class the LLM gets `keep` tokens in all of its layers.

    Parameters
    ----------
    keep
        The budget of stage 0, in which the ``[CLS]`` token counts.
    contextual_ratio
        Share of contextual tokens; 0 merges nothing. The one published stage 0 has 6 of 48, a ratio of 0.125.
    merge
        ``"add"``: the anchor plus the mean of its members, as in the official code. ``"mean"``: the mean of all.

    Notes
    -----
    Deviations from the paper: those of `VisionZip`. The share is a round choice near the published ones, which are
    12.5 to 16 % over all stages (UNVERIFIED at budgets other than 48).
    """

    contextual_ratio: float = 0.14

    paper = "arXiv:2506.22283"


@register("visiondrop_llm")
@dataclass(frozen=True)
class VisionDropLlm(InLlmReducer):
    """VisionDrop (arXiv 2506.22283, AAAI 2026), its stages inside the LLM alone.

    At each boundary tokens are ranked by the attention that they would get from all visual tokens in the layer behind
    it, mean over rows and heads, softmax over all keys. The highest are dominant; the others are merged to contextual
    tokens by the rule of `VisionZip`, with rotated keys (mean over key heads) to compare and hidden states to merge.

    Parameters
    ----------
    keep
        The budget: what the layers receive on average. The counts fall by the same factor at each boundary.
    layers
        The first layer of each further stage, counted from 0; by default those at 1/4, 2/4 and 3/4 of the depth, which
        is the paper's 8, 16 and 24 of 32.
    contextual_ratio
        Share of contextual tokens at each boundary; 0 merges nothing.
    merge
        ``"add"``: the anchor plus the mean of its members, as in the official code. ``"mean"``: the mean of all.
    rows
        ``"all"``: the mean counts all visual rows, as in the official code, which favours early tokens, as later ones
        are hidden from rows before them. ``"visible"``: it counts those that see the token.

    Notes
    -----
    Reads the attention rows of all visual tokens at each boundary, in chunks: no map is stored.

    Deviations from the paper: a contextual token is at its anchor's place, where the official code puts it behind the
    dominant ones. The counts of the one published configuration (48, 35, 26, 19, mean 32) are met; others are
    UNVERIFIED. A token's attention to itself counts, as in the official code, and there is no option to leave it out:
    the last token, which no other one sees, would have no score. With several images each is given its share of the
    count, in proportion to its tokens, and ranks by itself, as under a causal mask the first image gets attention from
    all of them.
    """

    keep: Keep
    layers: tuple[int, ...] | None = None
    contextual_ratio: float = 0.14
    merge: Literal["add", "mean"] = "add"
    rows: Literal["all", "visible"] = "all"

    needs = (SEEN, probes.LayerKeys())
    unit = "image"
    merges = "embeddings"
    positions = "compact"
    paper = "arXiv:2506.22283"
    complexity = "O(N S D + N T d) per boundary"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_contextual_ratio(self.contextual_ratio)
        if self.layers is not None:
            object.__setattr__(self, "layers", schedules.check_layers(self.name, self.layers))

    def check(self, model: Any, family: ModelFamily) -> None:
        if self.rows == "visible" and family.two_way:
            raise UnsupportedModelError(
                f"tokens of an image see each other in both directions in {family.name}: use rows='all', which counts "
                "all of them"
            )

    def boundaries(self, depth: int) -> Sequence[int]:
        return tuple(
            schedules.boundary_in(depth, b, self.name) for b in self.layers or schedules.after_shares(depth, QUARTERS)
        )

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        given, wanted = schedules.tokens_of(images), schedules.budget_of(self.keep, images)
        return schedules.falling(depth, self.boundaries(depth), given, wanted, self.name)

    def select(self, tokens: LayerTokens) -> Selection:
        if self.rows == "visible":
            tokens = _over_visible_rows(tokens)
        return tokens.per_prompt_merge(self._merge)

    def _merge(self, crops: CropBatch, count: int) -> Groups:
        contextual = contextual_count(count, self.contextual_ratio)
        return dominant_and_contextual(crops, count, contextual, self.merge, SEEN, probes.LayerKeys())


def _over_visible_rows(tokens: LayerTokens) -> LayerTokens:
    """Turn the mean over all visual rows into that over the rows from a token's own on."""
    rows = [(len(span), crop.index) for span in tokens.spans for crop in span.crops]
    attention = [x * n / (n - index.to(x.device)) for x, (n, index) in zip(tokens.probe(SEEN), rows, strict=True)]
    return replace(tokens, planes={**tokens.planes, SEEN: attention})


@register("visiondrop_all")
@dataclass(frozen=True)
class VisionDropAll(StagedReducer):
    """VisionDrop (arXiv 2506.22283, AAAI 2026), all stages: at the output of the encoder, and three inside the LLM.

    The encoder keeps 1.5 times the budget (three times that of videos), and the counts inside the LLM fall by the same
    factor at each boundary so that the layers receive the budget on average: 48, 35, 26 and 19 tokens for 32.

    Parameters
    ----------
    keep
        The budget: what the layers of the LLM receive on average.
    layers, contextual_ratio, merge, rows
        See `VisionDropLlm`; the ratio and the merging hold for all stages.

    Notes
    -----
    Deviations from the paper: those of `VisionDrop` and `VisionDropLlm`. Where the budget is more than an encoder can
    give 1.5 times of, it keeps everything. A budget per crop holds on average unless that is so for some crops only.
    """

    keep: Keep
    layers: tuple[int, ...] | None = None
    contextual_ratio: float = 0.14
    merge: Literal["add", "mean"] = "add"
    rows: Literal["all", "visible"] = "all"

    positions = "compact"
    merges = "features"
    paper = "arXiv:2506.22283"
    complexity = "O(N log N + N T d), then O(T S D) per boundary"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stages()

    def stages(self) -> tuple[Method, ...]:
        first, inside = schedules.staged_budgets(self.name, self.keep, FIRST)
        return (
            VisionDrop(first, self.contextual_ratio, self.merge),
            VisionDropLlm(inside, self.layers, self.contextual_ratio, self.merge, self.rows),
        )
