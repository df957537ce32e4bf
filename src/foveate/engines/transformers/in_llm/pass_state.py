"""The tokens of one forward pass, and what methods inside the LLM have left of them so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.core.in_llm import InLlmReducer, planned
from foveate.core.merges import composed, joined
from foveate.core.selection import Merge, SpanSelection
from foveate.core.spans import Crop
from foveate.engines.transformers.in_llm.boundaries import Boundaries
from foveate.engines.transformers.in_llm.kept_columns import RemainingTokens
from foveate.engines.transformers.prompt_tokens import PromptTokens, thinned_crop


class PassState:
    """The tokens of one forward pass.

    Parameters
    ----------
    prompts
        The prompts that have visual tokens in this pass.
    shape
        ``(B, q)``: prompts, and columns that the pass adds.
    past
        Columns of the first layer before this pass.
    mask
        ``[B, past + q]``, zero at padding, or `None`.

    Attributes
    ----------
    remaining
        What is left behind the last boundary at which tokens were dropped; `None` in front of the first one.
    cuts
        The boundaries at which tokens were dropped, and what was left behind them.
    merges
        Per such boundary and prompt, how the prompt's visual tokens as they entered the LLM flow into those left
        there, if any have merged so far.
    """

    def __init__(
        self,
        boundaries: Boundaries,
        prompts: Sequence[PromptTokens],
        shape: tuple[int, int],
        past: int,
        mask: Tensor | None,
        device: torch.device,
    ):
        self.boundaries, self.prompts, self.past, self.device = boundaries, prompts, past, device
        self.batch, self.width = shape
        self.remaining: RemainingTokens | None = None
        self.cuts: list[tuple[int, RemainingTokens]] = []
        self.merges: dict[int, list[Merge | None]] = {}
        if prompts:  # a step of decoding has none, and must cost nothing
            self._take_in(mask)

    def _take_in(self, mask: Tensor | None) -> None:
        content = torch.ones(self.batch, self.width, dtype=torch.bool) if mask is None else mask.cpu().bool()
        content = content[:, -self.width :]
        self._pads_right = bool((~content[:, -1]).any())
        columns = torch.where(content, torch.arange(self.width), -1).to(self.device)
        visual = [p.columns[: p.free] for p in self.prompts]
        origin = [torch.arange(p.free, device=self.device) for p in self.prompts]
        self._whole = RemainingTokens(columns, content.sum(dim=1).tolist(), visual, origin)
        plans = [planned(self.boundaries.reducers, self.boundaries.depth, p.images) for p in self.prompts]
        self._plans = [{b: count for plan in parts for b, count in plan.items()} for parts in plans]

    @property
    def tokens(self) -> RemainingTokens:
        """The tokens that are left so far, of a pass with visual tokens."""
        return self.remaining or self._whole

    @property
    def current_width(self) -> int:
        """Number of tokens per prompt that are left so far, R."""
        return self.width if self.remaining is None else self.remaining.width

    def first_layer_columns(self, sample: int, rows: Tensor) -> Tensor:
        """Return the columns of the first layer of some of the tokens of a prompt that are left."""
        return self.tokens.index[sample].index_select(0, rows) + self.past

    def extent(self, sample: int) -> tuple[int, int]:
        """Return where the tokens of a prompt begin and end among those that are left."""
        length = self.tokens.lengths[sample]
        return (0, length) if self._pads_right else (self.tokens.width - length, self.tokens.width)

    def crops(self, prompt: int, unit: str) -> tuple[Crop, ...]:
        """Return the crops of a prompt as they are now."""
        origin = self.tokens.origin[prompt]
        if unit == "prompt":
            return (Crop(torch.arange(len(origin)), None),)
        crops = self.prompts[prompt].crops(unit)
        if len(origin) == self.prompts[prompt].free:
            return crops  # without waiting for the device
        host = origin.cpu()
        return tuple(thinned_crop(crop, host) for crop in crops)

    def wanted(self, boundary: int) -> list[int]:
        """Return how many free visual tokens of each prompt are to be left behind a boundary."""
        return [max(plan[boundary] - p.fixed, 0) for plan, p in zip(self._plans, self.prompts, strict=True)]

    def acting(self, boundary: int) -> InLlmReducer | None:
        """Return the method that drops tokens at a boundary in this pass, if there is one."""
        reducer = self.boundaries.at.get(boundary) if self.prompts else None
        if reducer is None or not any(map(len, self.tokens.visual)):
            return None
        wanted = zip(self.wanted(boundary), self.tokens.visual, strict=True)
        return reducer if reducer.adaptive or any(count < len(visual) for count, visual in wanted) else None

    def drop(self, boundary: int, chosen: Sequence[SpanSelection]) -> Tensor:
        """Leave the chosen visual tokens alone; returns which of those before they are, ``[B, R]``.

        Shapes follow from the numbers of tokens, so that nothing waits for the device.
        """
        before = self.tokens
        keep, lengths = before.index >= 0, list(before.lengths)
        kept = []
        for prompt, picked, visual in zip(self.prompts, chosen, before.visual, strict=True):
            places = visual.index_select(0, picked.kept)
            keep[prompt.sample, visual] = False
            keep[prompt.sample, places] = True
            lengths[prompt.sample] -= len(visual) - len(places)
            kept.append(places)
        width = max(lengths)
        if self._pads_right:
            order = torch.argsort((~keep).int(), dim=1, stable=True)[:, :width]
        else:
            order = torch.argsort(keep.int(), dim=1, stable=True)[:, before.width - width :]
        rank = keep.cumsum(dim=1) - 1
        visual_now = []
        for prompt, places in zip(self.prompts, kept, strict=True):
            shift = 0 if self._pads_right else width - lengths[prompt.sample]
            visual_now.append(rank[prompt.sample].index_select(0, places) + shift)
        index = before.index.gather(1, order)
        if any(n < width for n in lengths):
            index = torch.where(keep.gather(1, order), index, -1)
        origin = [o.index_select(0, picked.kept) for o, picked in zip(before.origin, chosen, strict=True)]
        self.remaining = RemainingTokens(index, lengths, visual_now, origin)
        earlier = self.merges[self.cuts[-1][0]] if self.cuts else [None] * len(self.prompts)
        self.merges[boundary] = [
            composed(merge, places, picked)
            for merge, places, picked in zip(earlier, before.origin, chosen, strict=True)
        ]
        self.cuts.append((boundary, self.remaining))
        return order

    def selections(self, remaining: RemainingTokens | None = None) -> list[list[SpanSelection]]:
        """Return which tokens of each image are left, by default behind the last boundary, prompt by prompt."""
        left = remaining or self.tokens
        boundary = next((b for b, behind in self.cuts if behind is left), None)
        merges = [None] * len(self.prompts) if boundary is None else self.merges[boundary]
        rows: list[list[SpanSelection]] = [[] for _ in range(self.batch)]
        for prompt, origin, merge in zip(self.prompts, left.origin, merges, strict=True):
            last = torch.arange(prompt.free, len(prompt.columns), device=origin.device)
            if merge is not None:
                ones = torch.ones(len(last), device=origin.device)
                merge = joined(merge, Merge(last - prompt.free + len(origin), last, ones))
            rows[prompt.sample] = prompt.selection(torch.cat([origin, last]), merge)
        return rows
