"""Tokens at a boundary inside the LLM, made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.in_llm import LayerTokens
from foveate.core.probes import LlmProbe
from foveate.core.spans import Crop, Span


def layer_tokens(
    sizes: Sequence[int],
    counts: Sequence[int] | None = None,
    planes: Mapping[LlmProbe, Sequence[Tensor]] | None = None,
    *,
    boundary: int = 1,
    depth: int = 4,
    **fields: Any,
) -> LayerTokens:
    """Make the tokens of prompts that have `sizes` visual tokens each, of which `counts` are to be left.

    `planes` hold one tensor ``[n, ...]`` per prompt; `fields` are further ones of `LayerTokens`.
    """
    spans = tuple(
        Span("image", i, 0, torch.arange(n), (1, 1, n), (Crop(torch.arange(n), None),)) for i, n in enumerate(sizes)
    )
    given = {
        "counts": tuple(counts if counts is not None else sizes),
        "images": tuple([("image", n)] for n in sizes),
        "origin": tuple(torch.arange(n) for n in sizes),
        "places": tuple(torch.arange(n) for n in sizes),
    }
    values: Any = {probe: list(rows) for probe, rows in (planes or {}).items()}
    return LayerTokens(spans, values, torch.device("cpu"), boundary=boundary, depth=depth, **{**given, **fields})
