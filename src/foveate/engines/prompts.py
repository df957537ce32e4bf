"""Batches of model inputs: some of their prompts with their pictures, and prompts with answers behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from foveate.families import Family
from foveate.tokens import Span


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
            kind = family.inputs.get(name) or ("video" if "video" in name else "image")
            own = [span for span in spans if span.kind == kind]
            picked = _rows(value, own, inputs.get(f"{kind}_grid_thw"), rows, batch)
            if picked is None:
                return None
            if len(picked):
                out[name] = picked
    return out


def with_answer(family: Family, inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """Put answers ``[B, T]`` behind the prompts ``[B, L]`` of model inputs, in all planes."""
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], dim=1)}
    planes = {"attention_mask": 1, "token_type_ids": family.answer_type, "mm_token_type_ids": 0}
    for name, value in planes.items():
        if (plane := inputs.get(name)) is not None:
            out[name] = torch.cat([plane, plane.new_full(answer.shape, value)], dim=1)
    return out


def _rows(value: Any, spans: Sequence[Span], grids: Tensor | None, rows: Sequence[int], batch: int) -> Any | None:
    """Return the rows of an input with pixels, or with something about them, that belong to some prompts."""
    if not isinstance(value, Tensor):
        return None
    patches = None if grids is None else [int(n) for n in grids.prod(dim=1)]
    one_each = [span.sample for span in spans] == list(range(batch))
    if len(value) == len(spans) and (one_each or len(value) != batch):
        sizes = [1] * len(spans)
    elif patches is not None and len(patches) == len(spans) and len(value) == sum(patches):
        sizes = patches
    elif len(value) == sum(len(span.crops) for span in spans) and len(value) != batch:
        sizes = [len(span.crops) for span in spans]
    else:
        return None
    ends = list(accumulate(sizes))
    index = [
        i
        for span, size, end in zip(spans, sizes, ends, strict=True)
        if span.sample in rows
        for i in range(end - size, end)
    ]
    return value[torch.tensor(index, dtype=torch.long, device=value.device)]
