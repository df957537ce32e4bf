"""Reducing the inputs of one call, which may go on from a cache whose prompts were reduced before."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.core.ambient import defaults
from foveate.core.errors import InputError
from foveate.core.in_llm import InLlmReducer
from foveate.core.selection import Selection
from foveate.core.spans import Span
from foveate.engines.finite import check_pixels
from foveate.engines.pipeline import Meter
from foveate.engines.settings import Settings
from foveate.engines.transformers.bias.planes import Bias
from foveate.engines.transformers.caches import BIAS, COMPACTION, KEPT_COLUMNS, forget, noted
from foveate.engines.transformers.compaction import Compaction, check_mask, position_behind
from foveate.engines.transformers.full_length import FullLength
from foveate.engines.transformers.keywords import compact_columns, compact_planes
from foveate.engines.transformers.priors import priors_from_scores
from foveate.engines.transformers.prompt_tokens import Prefill, tokens_by_prompt
from foveate.engines.transformers.reduce import (
    Reduced,
    pad_id,
    reduce_with,
    rotary_axes,
    shown_to_llm,
    with_positions,
)
from foveate.engines.transformers.results import Results
from foveate.families import Family

_PLANES = ("attention_mask", "labels", "token_type_ids", "mm_token_type_ids")


class Call(threading.local):
    """What a thread is in the middle of; each has a call of its own.

    Attributes
    ----------
    generating
        Whether the passes of the model are those of ``generate``, which was given reduced inputs.
    numbered
        Whether the next pass of ``generate`` must be given position ids.
    prefill
        The visual tokens that the next pass gives the LLM.
    compaction
        Of a pass outside of ``generate``: how its columns map to those of the prompts.
    spread
        Of such a pass whose outputs are to have the full length: what stands where.
    scores
        What `Handle.scored` was given.
    bias
        By what the attention logits of all columns are raised, those of a cache included.
    """

    generating: bool = False
    numbered: bool = False
    prefill: Prefill | None = None
    compaction: Compaction | None = None
    spread: FullLength | None = None
    scores: Sequence[Tensor] | None = None
    bias: Bias | None = None


class Continuation:
    """Reduces the inputs of calls, first ones and later turns of a conversation alike.

    A cache carries a note on how its columns map to those of the prompts (see `caches.note`), so that callers go on
    with the ids and masks of the full conversation, as they do without foveate.
    """

    def __init__(self, model: Any, family: Family, settings: Settings, results: Results, call: Call, meter: Meter):
        self._model, self._family, self._settings = model, family, settings
        self._results, self._call, self._meter = results, call, meter

    @defaults()
    def reduce(self, inputs: Mapping[str, Any], cache: Any) -> Reduced:
        """Return what the model is to be given in place of some inputs; its bias is that of all columns."""
        filled = int(cache.get_seq_length()) if cache is not None else 0
        if not filled:
            forget(cache)
        out, earlier = self._of_cache(inputs, cache, filled), noted(cache, BIAS)
        if earlier is not None and not self._settings.rectify:
            raise InputError(
                "the tokens of this cache were attended to with a bias: attach the method with rectify, or start with "
                "a new cache"
            )
        if filled and out.bias is not None:
            out.bias = out.bias.behind(earlier, filled)
        elif filled:
            out.bias = earlier
        return out

    def _of_cache(self, inputs: Mapping[str, Any], cache: Any, filled: int) -> Reduced:
        """Return the same; the bias is that of the new columns."""
        settings = self._settings
        if not settings.inside and noted(cache, KEPT_COLUMNS):
            raise InputError(
                "the deep layers of this cache hold fewer tokens than the first ones: attach the method inside the LLM "
                "that filled it, or start with a new cache"
            )
        known: Compaction | None = noted(cache, COMPACTION)
        if settings.before is None and not settings.judging and known is None:
            self._show_whole(inputs, filled)
            # Later turns of M-RoPE models need the positions of what is cached; others count along it by themselves.
            if not (filled and self._family.keeps_positions):
                return Reduced(inputs)
        if known is None and filled and self._has_images(inputs):
            known = self._uncompacted(inputs, filled)
        if known is not None:
            return self._go_on(inputs, known, filled)
        return self._reduce(inputs, settings)

    def _has_images(self, inputs: Mapping[str, Any]) -> bool:
        return any(inputs.get(key) is not None for key in self._family.inputs)

    def _reduce(self, inputs: Mapping[str, Any], settings: Settings) -> Reduced:
        """Let the methods before the LLM act, and note for those inside it what is left."""
        out = reduce_with(self._model, self._family, inputs, settings, self._meter)
        if settings.inside and out.compaction is not None:
            out.priors = {**out.priors, **self._priors(out.spans, out.selection)}
            self._call.prefill = shown_to_llm(inputs, out)
        elif settings.inside:
            self._show_whole(inputs, 0)  # the methods before the LLM keep everything
        if out.selection is not None:
            self._results.begin(out.selection, len(inputs["input_ids"]))
        return out

    def _show_whole(self, inputs: Mapping[str, Any], filled: int) -> None:
        """Note the visual tokens that the LLM is given where nothing drops any, behind so many columns in a cache."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not self._has_images(inputs):
            if inputs.get("mm_encoder_outputs") is not None and ids is not None:
                self._results.begin(None, len(ids))
            return
        if ids is None:
            raise InputError("a method inside the LLM needs input_ids: inputs_embeds do not show where the images are")
        check_mask(mask, ids.shape[1] if mask is None or not isinstance(mask, Tensor) else mask.shape[-1])
        ids = ids if _only_new(ids, mask, filled) else ids[:, filled:]
        spans = self._family.spans(self._model, {**inputs, "input_ids": ids})
        check_pixels(self._model, self._family, inputs, spans)
        self._results.begin(None, len(ids))
        prompts = tokens_by_prompt(spans, mask, ids.shape[1], ids.device, priors=self._priors(spans))
        self._call.prefill = Prefill(prompts, *ids.shape)

    def _priors(self, spans: Sequence[Span], kept: Selection | None = None) -> dict[InLlmReducer, list[Tensor]]:
        """Return the scores that `Handle.scored` was given, per span those of the tokens that are left."""
        readers = [r for r in self._settings.inside if r.guided]
        if self._call.scores is None or not readers:
            return {}
        return priors_from_scores(readers, self._call.scores, spans, kept)

    def _uncompacted(self, inputs: Mapping[str, Any], filled: int) -> Compaction:
        """Describe a cache that holds whole prompts, of which the handle knows nothing else."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        behind = None
        if self._family.keeps_positions:
            behind = ids.new_full((len(ids),), filled) if mask is None else mask[:, :filled].sum(dim=1)
            # An image takes fewer positions than columns; the model remembers by how many, for the last call alone.
            deltas = self._family.position_deltas(self._model)
            if deltas is not None and len(ids) % len(deltas) == 0:
                behind = behind + deltas.flatten().to(behind.device).repeat_interleave(len(ids) // len(deltas))
        return Compaction(torch.arange(filled, device=ids.device).expand(len(ids), -1), filled, False, behind)

    def _go_on(self, inputs: Mapping[str, Any], prefix: Compaction, filled: int) -> Reduced:
        """Reduce what follows the prompts of a cache that holds so many columns."""
        ids = inputs["input_ids"]
        if filled < prefix.width:
            prefix = prefix.cropped(filled)
        prefix = prefix.expanded(len(ids))
        cached = prefix.length + filled - prefix.width  # columns that the cache stands for
        only_new = _only_new(ids, inputs.get("attention_mask"), cached)
        new = {**inputs, "input_ids": ids if only_new else ids[:, cached:]}
        length = new["input_ids"].shape[1]
        for key in _PLANES:
            if isinstance(plane := inputs.get(key), Tensor) and plane.shape[1] == cached + length:
                new[key] = plane[:, cached:]
        own = new.pop("position_ids", None)
        # `_join` numbers it, behind what is cached.
        tail = self._reduce(new, replace(self._settings, positions="compact"))
        kept = tail.compaction or Compaction(
            torch.arange(length, device=ids.device).expand(len(ids), -1), length, padded=False
        )
        prefix = prefix.then(cached - prefix.length)
        if self._family.keeps_positions:
            positions = self._positions_behind(new, own, prefix)
            kept = replace(kept, behind=position_behind(positions, new.get("attention_mask")))
            inputs = {**inputs, "position_ids": torch.nn.functional.pad(positions, (prefix.length, 0))}
        return self._join(inputs, prefix, kept, tail, only_new)

    def _positions_behind(self, new: Mapping[str, Any], own: Tensor | None, prefix: Compaction) -> Tensor:
        """Return the M-RoPE positions ``[3, B, n]`` of the n columns that follow a cached prompt."""
        batch, length = new["input_ids"].shape
        if own is not None:
            return rotary_axes(own, batch, self._family.axes)[..., -length:]
        positions = self._family.positions(self._model, new)
        assert positions is not None
        assert prefix.behind is not None
        return positions + prefix.behind.to(positions.device)[:, None]

    def _join(
        self, inputs: Mapping[str, Any], prefix: Compaction, kept: Compaction, tail: Reduced, only_new: bool
    ) -> Reduced:
        """Put the compact continuation of a cached prompt together."""
        whole = prefix.followed_by(kept)
        batch, own = len(inputs["input_ids"]), inputs.get("position_ids")
        full = with_positions(inputs, (batch, whole.length), self._settings.positions)
        wanted = full.pop("logits_to_keep", None) if only_new else None
        out = Reduced(compact_planes(full, whole, pad_id(self._model)))
        if wanted is not None:  # counted from the first new column, or from the end
            out["logits_to_keep"] = compact_columns("logits_to_keep", wanted, kept)
        if only_new:  # planes that run along the whole conversation are compact now, those of the new columns are not
            out["input_ids"] = tail["input_ids"]
            if own is not None and own.shape[-1] == kept.length:
                own = own.expand(*own.shape[:-2], batch, -1)
                out["position_ids"] = kept.apply(own, dim=own.dim() - 1)
            elif out.get("position_ids") is not None:
                out["position_ids"] = out["position_ids"][..., -kept.width :]
        for key in (*self._family.inputs, *self._family.side_inputs):
            if key not in tail:
                out.pop(key, None)
        if "mm_encoder_outputs" in tail:
            out["mm_encoder_outputs"] = tail["mm_encoder_outputs"]
        out.selection, out.compaction, out.bias = tail.selection, whole, tail.bias
        out.added = kept if only_new else None
        return out


def _only_new(ids: Tensor, mask: Tensor | None, cached: int) -> bool:
    """Return whether ids are those behind so many cached columns alone, and not those of the full prompts.

    Both are customary. The mask tells, as it always covers what is cached; without one, ids that are no longer than
    what is cached cannot hold it.
    """
    return ids.shape[1] <= cached if mask is None else mask.shape[1] > ids.shape[1]
