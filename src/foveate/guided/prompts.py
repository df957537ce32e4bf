"""Batches of model inputs: some of their prompts with their pictures, and prompts with answers behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from foveate.core.spans import Span
from foveate.families import Family


def prompts_only(
    family: Family, inputs: Mapping[str, Any], spans: Sequence[Span], rows: Sequence[int]
) -> dict[str, Any] | None:
    """Return the inputs of some prompts of a batch, or `None` where it cannot be told which pixels are theirs.

    That is told by counting: pixels have a row per image, per crop, or per patch of the grids beside them.

    Parameters
    ----------
    spans
        The images and videos of the whole batch.
    rows
        Which prompts, ascending.
    """
    batch = len(inputs["input_ids"])
    if len(rows) == batch:
        return dict(inputs)
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        if name not in (*family.inputs, *family.side_inputs):
            out[name] = value[list(rows)] if isinstance(value, Tensor) and len(value) == batch else value
        elif value is not None:
            named = [kind for kind in family.kinds if kind == family.inputs.get(name) or kind in name]
            found = [_rows(value, spans, inputs, kind, rows, batch) for kind in named or family.kinds]
            indices = {tuple(index) for index in found if index is not None}
            if len(indices) != 1:
                return None
            if index := indices.pop():
                out[name] = value[torch.tensor(index, device=value.device)]
    return out


def with_answer(family: Family, inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """Put answers ``[B, T]`` behind the prompts ``[B, L]`` of model inputs, in all planes."""
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], dim=1)}
    planes = {"attention_mask": 1, "token_type_ids": family.answer_type, "mm_token_type_ids": 0}
    for name, value in planes.items():
        if (plane := inputs.get(name)) is not None:
            out[name] = torch.cat([plane, plane.new_full(answer.shape, value)], dim=1)
    return out


def _rows(
    value: Any, spans: Sequence[Span], inputs: Mapping[str, Any], kind: str, prompts: Sequence[int], batch: int
) -> list[int] | None:
    """Return which rows of an input belong to the pictures of some prompts, if it is about pictures of this kind."""
    own, grids = [span for span in spans if span.kind == kind], inputs.get(f"{kind}_grid_thw")
    patches = [] if grids is None else grids.prod(dim=1).tolist()
    one_each = [span.sample for span in own] == list(range(batch))
    if not isinstance(value, Tensor):
        return None
    if len(value) == len(own) and (one_each or len(value) != batch):
        sizes = [1] * len(own)
    elif len(patches) == len(own) and len(value) == sum(patches):
        sizes = patches
    elif len(value) == sum(len(span.crops) for span in own) and len(value) != batch:
        sizes = [len(span.crops) for span in own]
    else:
        return None
    ends = list(accumulate(sizes))
    return [
        i
        for span, size, end in zip(own, sizes, ends, strict=True)
        if span.sample in prompts
        for i in range(end - size, end)
    ]
