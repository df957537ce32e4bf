"""What users hand to ``generate`` to be called with the prompt: it is shown the full one, not the compact one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True, eq=False)
class WholePrompts:
    """Full prompts ``[B, L]``, in place of the first `width` columns that the model is given."""

    prompts: Tensor
    width: int

    def ids(self, ids: Tensor) -> Tensor:
        """Return ids ``[B * n, width + t]`` with the full prompts in front, each of which stands n times in a row."""
        prompts = self.prompts.to(ids.device).repeat_interleave(len(ids) // len(self.prompts), dim=0)
        return torch.cat([prompts, ids[:, self.width :]], dim=1)


def show_whole_prompts(kwargs: dict[str, Any], prompts: Tensor, width: int) -> None:
    """Wrap the callbacks among the keywords of ``generate``: streamers, criteria, processors, allowed tokens."""
    whole = WholePrompts(prompts, width)
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _Streamer(kwargs["streamer"], prompts)
    if kwargs.get("stopping_criteria"):
        kwargs["stopping_criteria"] = StoppingCriteriaList(_Criterion(c, whole) for c in kwargs["stopping_criteria"])
    if kwargs.get("logits_processor"):
        kwargs["logits_processor"] = LogitsProcessorList(_Processor(p, whole) for p in kwargs["logits_processor"])
    if (allowed := kwargs.get("prefix_allowed_tokens_fn")) is not None:
        kwargs["prefix_allowed_tokens_fn"] = _allowed(allowed, whole)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    def __init__(self, streamer: BaseStreamer, prompt: Tensor):
        self._streamer, self._prompt = streamer, prompt

    def put(self, value: Tensor) -> None:
        # What `generate` puts first is the prompt.
        self._streamer.put(value if self._prompt is None else self._prompt.cpu())
        self._prompt = None  # type: ignore[assignment]

    def end(self) -> None:
        self._streamer.end()


class _Criterion(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, criterion: Callable[..., Any], whole: WholePrompts):
        self._criterion, self._whole = criterion, whole

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._criterion(self._whole.ids(input_ids), scores, **kwargs)


class _Processor(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, processor: Callable[..., Tensor], whole: WholePrompts):
        self._processor, self._whole = processor, whole

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._processor(self._whole.ids(input_ids), scores)


def _allowed(
    function: Callable[[int, Tensor], Sequence[int]], whole: WholePrompts
) -> Callable[[int, Tensor], Sequence[int]]:
    def allowed(prompt: int, ids: Tensor) -> Sequence[int]:
        return function(prompt, torch.cat([whole.prompts[prompt].to(ids.device), ids[whole.width :]]))

    return allowed
