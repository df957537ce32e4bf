"""What users hand to ``generate`` to be called with the prompt: it is shown the full one, not the compact one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True, eq=False)
class WholePrompts:
    """Full prompts ``[B, L]``, in place of the first `width` columns that the model is given.

    Attributes
    ----------
    prompts
        `None` if the model is given the full prompts.
    outside
        Entered around each callback: what it runs on the model is no part of this ``generate``.
    """

    prompts: Tensor | None
    width: int
    outside: Callable[[], AbstractContextManager[None]]

    def ids(self, ids: Tensor) -> Tensor:
        """Return ids ``[B * n, width + t]`` with the full prompts in front, each of which stands n times in a row."""
        if self.prompts is None:
            return ids
        prompts = self.prompts.to(ids.device).repeat_interleave(len(ids) // len(self.prompts), dim=0)
        return torch.cat([prompts, ids[:, self.width :]], dim=1)

    def of_prompt(self, prompt: int, ids: Tensor) -> Tensor:
        """Return the ids ``[width + t]`` of one prompt with the full one in front."""
        if self.prompts is None:
            return ids
        return torch.cat([self.prompts[prompt].to(ids.device), ids[self.width :]])


def wrap_callbacks(kwargs: dict[str, Any], whole: WholePrompts) -> None:
    """Wrap the callbacks among the keywords of ``generate``: streamers, criteria, processors, allowed tokens."""
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _Streamer(kwargs["streamer"], whole)
    if kwargs.get("stopping_criteria"):
        kwargs["stopping_criteria"] = StoppingCriteriaList(_Criterion(c, whole) for c in kwargs["stopping_criteria"])
    if kwargs.get("logits_processor"):
        kwargs["logits_processor"] = LogitsProcessorList(_Processor(p, whole) for p in kwargs["logits_processor"])
    if (allowed := kwargs.get("prefix_allowed_tokens_fn")) is not None:
        kwargs["prefix_allowed_tokens_fn"] = _allowed(allowed, whole)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    def __init__(self, streamer: BaseStreamer, whole: WholePrompts):
        self._streamer, self._prompt, self._outside = streamer, whole.prompts, whole.outside

    def put(self, value: Tensor) -> None:
        # What `generate` puts first is the prompt.
        value, self._prompt = (value if self._prompt is None else self._prompt.cpu()), None
        with self._outside():
            self._streamer.put(value)

    def end(self) -> None:
        with self._outside():
            self._streamer.end()


class _Criterion(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, criterion: Callable[..., Any], whole: WholePrompts):
        self._criterion, self._whole = criterion, whole

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        with self._whole.outside():
            return self._criterion(self._whole.ids(input_ids), scores, **kwargs)


class _Processor(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, processor: Callable[..., Tensor], whole: WholePrompts):
        self._processor, self._whole = processor, whole

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with self._whole.outside():
            return self._processor(self._whole.ids(input_ids), scores)


def _allowed(
    function: Callable[[int, Tensor], Sequence[int]], whole: WholePrompts
) -> Callable[[int, Tensor], Sequence[int]]:
    def allowed(prompt: int, ids: Tensor) -> Sequence[int]:
        with whole.outside():
            return function(prompt, whole.of_prompt(prompt, ids))

    return allowed
