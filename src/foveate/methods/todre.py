"""ToDRE: tokens that point in directions as different as possible, and none in late layers that ignore them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.author import (
    CropBatch,
    CropReducer,
    FoveateError,
    Images,
    InLlmReducer,
    Keep,
    LayerTokens,
    Method,
    Selection,
    StagedReducer,
    budget,
    probes,
    ranking,
    register,
    schedules,
)


@register("todre")
@dataclass(frozen=True)
class ToDRE(CropReducer):
    """ToDRE (arXiv 2505.18757), stage 1 only: greedy diversity from a salient pivot.

    The first token is the one with the most ``[CLS]`` attention ``[N]``; each further one is the least similar to those
    picked, by cosines of embeddings ``[N, D]``. `ToDREAll` also drops all visual tokens in the late layers of the LLM.

    Parameters
    ----------
    keep
        The budget T.
    criterion
        ``"max_sum"``: similar means the sum of the cosines with all picked tokens (version 2 of the paper). It takes
        extremes, and possibly near copies among them. ``"k_center"``: the largest of these cosines (version 1).

    Notes
    -----
    Costs ``O(N^2 D)`` for up to 1,024 tokens, and ``O(N)`` per pick. Of more tokens only the cosines with picked ones
    are computed, in single rows or, on a CPU, along with those of the next best tokens.

    Deviations from the paper: each crop, tile or frame starts from its own pivot. With a joint budget there is a single
    one among all tokens; on tiles the paper takes it from the thumbnail. Newline vectors do not compete. The pivot's
    attention is that of the layer that makes the features (UNVERIFIED), or the attention that each token receives where
    the encoder has no ``[CLS]``. A ratio rounds half to even, as everywhere here, where the paper truncates.
    """

    criterion: Literal["max_sum", "k_center"] = "max_sum"

    needs = (probes.Embeddings(), probes.Attention())
    paper = "arXiv:2505.18757"
    complexity = "O(N^2 D + T N)"

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        cosines = ranking.CosineRows(crops.probe(probes.Embeddings()))
        saliency = crops.probe(probes.Attention())
        taken = torch.zeros_like(saliency, dtype=torch.bool)
        picks = [ranking.take_best(saliency, taken)]
        closeness = cosines.of(picks[0], saliency)
        while len(picks) < count:
            picks.append(ranking.take_best(-closeness, taken))
            row = cosines.of(picks[-1], (-closeness).masked_fill(taken, -torch.inf))
            closeness = closeness + row if self.criterion == "max_sum" else torch.maximum(closeness, row)
        return torch.cat(picks, dim=1)


@register("todre_exit")
@dataclass(frozen=True)
class ToDREExit(InLlmReducer):
    """ToDRE (arXiv 2505.18757), stage 2 alone: no visual tokens in the late layers of texts that look away.

    Of the layer in front of the boundary, the text behind the last image gives visual tokens a share of its attention,
    mean over rows and heads. If that is less than `tau`, all visual tokens of the prompt go; else all stay.

    Parameters
    ----------
    keep
        None: the method has no budget.
    tau
        The share of attention below which visual tokens go.
    layer
        The first layer that runs without them, counted from 0; by default ``int(7 / 8 * depth)``, 28 of 32.

    Notes
    -----
    Waits for the device once per pass, as the number of tokens depends on it. Every prompt of a batch decides for
    itself, in the pass that shows the image; tokens are not looked at again while decoding.

    Deviations from the paper: it counts layers from 0 or from 1 (UNVERIFIED); here the layer whose attention decides is
    the last one with visual tokens. The paper also asks that visual tokens give the text less than `tau`; as the text
    that counts follows the image, they cannot see it and give it nothing. Which text counts is UNVERIFIED. A prompt
    without text behind its image keeps all tokens.
    """

    keep: None = None
    tau: float = 0.1
    layer: int | None = None

    needs = (probes.LayerAttention("text"),)
    adaptive = True
    budgets = ()
    paper = "arXiv:2505.18757"
    complexity = "O(M S D)"

    def __post_init__(self) -> None:
        if self.keep is not None:
            raise FoveateError(f"{self.name} keeps all tokens or none, by tau: leave keep={self.keep!r} out")
        if not budget.is_number(self.tau) or self.tau < 0.0:
            raise FoveateError(f"tau is a share of attention such as 0.1, not {self.tau!r}")
        if self.layer is not None:
            schedules.check_layers(self.name, (self.layer,))

    def boundaries(self, depth: int) -> Sequence[int]:
        return (schedules.boundary_in(depth, self.layer or int(depth * 7 / 8), self.name),)

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        return (0,)

    def select(self, tokens: LayerTokens) -> Selection:
        (attention,) = self.needs
        shares = torch.stack([x.sum() for x in tokens.probe(attention)]).tolist()
        stays = [share >= self.tau or not behind for share, behind in zip(shares, tokens.behind, strict=True)]
        return tokens.selection(
            {
                i: [torch.arange(len(tokens.spans[i]), device=tokens.device)]
                for i, all_stay in enumerate(stays)
                if all_stay
            }
        )


@register("todre_all")
@dataclass(frozen=True)
class ToDREAll(StagedReducer):
    """ToDRE (arXiv 2505.18757), both stages: diverse tokens, and none in late layers that look away.

    Parameters
    ----------
    keep
        The budget of stage 1, which is what the paper calls the budget; layers from 7/8 of the depth on may receive
        nothing.
    criterion
        See `ToDRE`.
    tau, layer
        See `ToDREExit`.
    """

    keep: Keep
    criterion: Literal["max_sum", "k_center"] = "max_sum"
    tau: float = 0.1
    layer: int | None = None

    paper = "arXiv:2505.18757"
    complexity = "O(N^2 D + T N), then O(M S D)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stages()

    def stages(self) -> tuple[Method, ...]:
        return ToDRE(self.keep, self.criterion), ToDREExit(tau=self.tau, layer=self.layer)
