"""Spans among the placeholders of a batch, put in order, and their embeddings as models take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.errors import InputError
from foveate.core.probes import Probe
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens


def placeholder_columns(ids: Tensor, token_id: int, lengths: Sequence[int], kind: str) -> Iterator[tuple[int, Tensor]]:
    """Hand out the placeholders of a batch to images of known lengths.

    Parameters
    ----------
    ids
        ``[B, L]`` on the CPU.
    token_id
        The placeholder's id.
    lengths
        Visual tokens per image, in the order in which the images appear.

    Yields
    ------
    tuple
        The row, and the columns ``[N]``, of each image.

    Raises
    ------
    InputError
        If the placeholders of a row are not those of a whole number of images.
    """
    i = 0
    for row, found in enumerate(ids == token_id):
        columns, start = found.nonzero().flatten(), 0
        while start < len(columns):
            if i == len(lengths) or start + lengths[i] > len(columns):
                raise _mismatch(int((ids == token_id).sum()), lengths, kind)
            yield row, columns[start : start + lengths[i]]
            start, i = start + lengths[i], i + 1
    if i < len(lengths):
        raise _mismatch(int((ids == token_id).sum()), lengths, kind)


def _mismatch(placeholders: int, lengths: Sequence[int], kind: str) -> InputError:
    return InputError(
        f"the prompts hold {placeholders} {kind} placeholder tokens, but the {len(lengths)} {kind}(s) passed make "
        f"{sum(lengths)}: put one {kind} token per {kind} in the text and let the model's processor expand it"
    )


def one_row_per_token(embeds: Sequence[Tensor]) -> Tensor:
    """Join embeddings ``[K, D]`` of images that keep different numbers of tokens to the one tensor that a model takes.

    Returns
    -------
    Tensor
        ``[sum of K, 1, D]``: as if each token were an image, so that beam search can repeat those of each prompt.
    """
    return torch.cat(list(embeds))[:, None]


def joined_outputs(spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
    """Wrap embeddings ``[K, D]`` per span as ``mm_encoder_outputs`` of a model that takes one tensor per kind."""
    outputs = {}
    for kind in dict.fromkeys(span.kind for span in spans):
        rows = [x for x, span in zip(embeds, spans, strict=True) if span.kind == kind]
        outputs[kind] = BaseModelOutputWithPooling(pooler_output=one_row_per_token(rows))
    return outputs


def in_reading_order(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Sort spans of several kinds, prompt by prompt and left to right, and number those of each prompt."""
    ordered: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.sample, int(s.columns[0]))):
        ordered.append(replace(span, ordinal=sum(s.sample == span.sample for s in ordered)))
    return tuple(ordered)


def interleaved(spans: Sequence[Span], kinds: Mapping[str, VisualTokens]) -> VisualTokens:
    """Put the tokens of several kinds of spans together, each kind in the order in which its spans appear."""
    parts = list(kinds.values())
    if len(parts) == 1:
        return parts[0]
    hidden = {kind: iter(tokens.hidden) for kind, tokens in kinds.items()}
    embedded = {kind: iter(tokens.embedded or ()) for kind, tokens in kinds.items()}
    planes: dict[Probe, list[Tensor]] = {}
    for probe in parts[0].planes:
        values = {kind: iter(tokens.planes[probe]) for kind, tokens in kinds.items()}
        planes[probe] = [next(values[span.kind]) for span in spans for _ in span.crops]
    return replace(
        parts[0],
        spans=tuple(spans),
        planes=planes,
        hidden=[next(hidden[span.kind]) for span in spans],
        embedded=None if parts[0].embedded is None else [next(embedded[span.kind]) for span in spans],
    )
