"""The visual tokens that the LLM is given of each prompt, and the columns of a forward pass that they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core.in_llm import InLlmReducer
from foveate.core.selection import Merge, Selection, SpanSelection
from foveate.core.spans import Crop, Span
from foveate.engines.transformers.compaction import Compaction, check_visible

_TOKENS = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """The visual tokens of one prompt that the LLM is given in one pass, n of them.

    Attributes
    ----------
    sample
        Row of the batch.
    spans
        The images and videos, in the columns of the full prompt.
    kept
        Per span the positions in it ``[K]`` that a method before the LLM has left.
    columns
        ``[n]`` int64: where they are in the pass.
    behind
        How many tokens of text follow the last of them.
    priors
        Scores ``[n]`` that a method inside the LLM made of the tokens before.
    counts
        ``[n]``: how many tokens each stands for, if that matters and methods before the LLM have dropped some.
    """

    sample: int
    spans: tuple[Span, ...]
    kept: tuple[Tensor, ...]
    columns: Tensor
    behind: int
    priors: Mapping[InLlmReducer, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None

    @property
    def images(self) -> list[tuple[str, int]]:
        """The kind and the number of tokens of each image."""
        return [(span.kind, len(kept)) for span, kept in zip(self.spans, self.kept, strict=True)]

    @property
    def fixed(self) -> int:
        """How many of the last visual tokens must stay: the one that ends the prompt, as logits are read from it."""
        return int(self.behind == 0)

    @property
    def free(self) -> int:
        """How many visual tokens methods choose from."""
        return len(self.columns) - self.fixed

    def crops(self, unit: str) -> tuple[Crop, ...]:
        """Return the sets of tokens that a method selects from, see `InLlmReducer.unit`, as positions among the n."""
        if unit == "prompt":
            return (Crop(torch.arange(self.free), None),)
        crops, start = [], 0
        for span, kept in zip(self.spans, self.kept, strict=True):
            if unit == "image":
                crops.append(Crop(torch.arange(start, start + len(kept)), None))
            elif len(kept) == len(span):
                crops += [replace(crop, index=crop.index + start) for crop in span.crops]
            else:  # a method before the LLM has thinned them out
                crops += [thinned_crop(crop, kept.cpu(), start) for crop in span.crops]
            start += len(kept)
        return tuple(thinned_crop(crop, torch.arange(self.free)) for crop in crops) if self.fixed else tuple(crops)

    def selection(self, origin: Tensor, merge: Merge | None = None) -> list[SpanSelection]:
        """Return, per span, which of its tokens are left when those at `origin` among the n are, merged if they are.

        Tokens of other images that flowed into one of a span are rows behind its own, see `SpanSelection.extra`.
        """
        device, lengths = origin.device, [len(span) for span in self.spans]
        firsts = [sum(lengths[:i]) for i in range(len(lengths))]
        # Among all visual tokens of the full prompt.
        places = torch.cat([kept.to(device) + first for kept, first in zip(self.kept, firsts, strict=True)])
        left, found = places.index_select(0, origin), []
        for span, length, first in zip(self.spans, lengths, firsts, strict=True):
            own = (left >= first) & (left < first + length)
            here = None if merge is None else _into(merge, own, places, first, length)
            others = here is not None and bool((here.source >= length).any())
            extra = sum(lengths) - length if others else 0
            found.append(SpanSelection(length, left[own] - first, here, self.sample, span.kind, extra))
        return found

    def repeated(self, times: int) -> list[PromptTokens]:
        """Return the prompt as often as it stands in a batch in which each prompt stands several times in a row."""
        return [replace(self, sample=self.sample * times + i) for i in range(times)]


def _into(merge: Merge, own: Tensor, places: Tensor, first: int, length: int) -> Merge:
    """Return the entries of a merge of a prompt that flow into one span, its own tokens in front of all others.

    Parameters
    ----------
    own
        Which of the targets are of the span.
    places
        The sources among all visual tokens of the full prompt, of which `length` from `first` on are the span's.
    """
    stays, rank = own[merge.target], own.cumsum(0) - 1
    source = places.index_select(0, merge.source[stays]) - first
    source = torch.where(source < 0, source + first + length, torch.where(source < length, source, source + first))
    return Merge(rank[merge.target[stays]], source, merge.weight[stays])


def thinned_crop(crop: Crop, tokens: Tensor, start: int = 0) -> Crop:
    """Return a crop with those of its tokens that are among some others, as positions among these from `start` on.

    Parameters
    ----------
    tokens
        ``[k]`` int64 on the CPU: positions in what the crop's positions refer to, ascending.
    """
    found = torch.isin(tokens, crop.index).nonzero().flatten()
    return crop.thinned(torch.searchsorted(crop.index, tokens[found]), found + start)


@dataclass(frozen=True, eq=False)
class Prefill:
    """The visual tokens of a batch of prompts that the LLM is about to be given.

    Attributes
    ----------
    prompts
        The prompts that have some.
    batch, width
        Number of all prompts, and of the columns of each, as methods before the LLM have left them.
    """

    prompts: Sequence[PromptTokens]
    batch: int
    width: int

    def in_pass(self, batch: int, width: int) -> list[PromptTokens]:
        """Return the prompts as they are in a pass over the last columns, in which each may stand several times.

        ``generate`` repeats prompts for beams and several answers, and leaves out columns that the cache holds.
        """
        moved = [replace(p, columns=p.columns + width - self.width) for p in self.prompts]
        return [copy for prompt in moved for copy in prompt.repeated(batch // self.batch)]


def tokens_by_prompt(
    spans: Sequence[Span],
    mask: Tensor | None,
    width: int,
    device: torch.device,
    selection: Selection | None = None,
    compaction: Compaction | None = None,
    priors: Mapping[InLlmReducer, Sequence[Tensor]] | None = None,
    counts: Sequence[Tensor] | None = None,
) -> list[PromptTokens]:
    """Find the visual tokens that the LLM is given of some spans, prompt by prompt.

    Parameters
    ----------
    mask
        ``[B, past + width]``: attention mask of the full prompts, of which the pass adds the last `width` columns.
    selection, compaction
        What a method before the LLM left of the spans, and where it went.
    priors
        Per method and span a score of each token that is left.
    counts
        Per span how many tokens each token that is left stands for.

    Raises
    ------
    InputError
        If the mask hides some of the tokens.
    """
    kept = [torch.arange(len(span)) for span in spans] if selection is None else [chosen.kept for chosen in selection]
    places = None
    if compaction is not None:
        columns = compaction.columns.to(device)
        index = torch.where(columns < 0, compaction.length, columns)
        places = torch.zeros(len(columns), compaction.length + 1, dtype=torch.long, device=device)
        places = places.scatter(1, index, torch.arange(columns.shape[1], device=device).expand_as(columns))
    content = None if mask is None else mask[:, -width:].cpu().bool()
    if content is not None:
        for span in spans:
            check_visible(content, span)
    rows = []
    for sample in dict.fromkeys(span.sample for span in spans):
        own = [i for i, span in enumerate(spans) if span.sample == sample]
        where = torch.cat([spans[i].columns.to(device).index_select(0, kept[i].to(device)) for i in own])
        behind = int(spans[own[-1]].columns[-1]) + 1
        behind = width - behind if content is None else int(content[sample, behind:].sum())
        scores = {reducer: torch.cat([values[i] for i in own]).to(device) for reducer, values in (priors or {}).items()}
        where = where if places is None else places[sample].index_select(0, where)
        left = tuple(kept[i] for i in own)
        stands = None if counts is None else torch.cat([counts[i] for i in own]).to(device)
        rows.append(PromptTokens(sample, tuple(spans[i] for i in own), left, where, behind, scores, stands))
    return rows


def placeholders(model: Any, ids: Tensor, encoded: Mapping[str, Any]) -> list[Span]:
    """Return the images and videos whose placeholders ids ``[B, L]`` hold, in reading order.

    Parameters
    ----------
    encoded
        The ``mm_encoder_outputs`` that belong to them. Where these do not tell one image from the next, all
        placeholders of a prompt are one.
    """
    host, spans = ids.cpu(), []
    for kind, names in _TOKENS.items():
        token = next((t for name in names if (t := getattr(model.config, name, None)) is not None), None)
        if token is None:
            continue
        rows = [(row == token).nonzero().flatten() for row in host]
        outputs = getattr(encoded.get(kind), "pooler_output", None)
        lengths = [len(x) for x in outputs] if isinstance(outputs, list | tuple) else []
        if sum(lengths) != sum(map(len, rows)):
            lengths = [len(columns) for columns in rows if len(columns)]
        sizes = iter(lengths)
        for sample, columns in enumerate(rows):
            ordinal = 0
            while len(columns):
                own, columns = columns.tensor_split([next(sizes)])
                crop = Crop(torch.arange(len(own)), None)
                spans.append(Span(kind, sample, ordinal, own, (1, 1, len(own)), (crop,)))
                ordinal += 1
    return sorted(spans, key=lambda span: (span.sample, int(span.columns[0])))
