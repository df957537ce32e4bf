"""Attachments: a model that reduces its visual tokens until it is detached."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from foveate.core.errors import AttachError, InputError
from foveate.core.in_llm import InLlmReducer, of_encoder
from foveate.core.reducer import Method, Positions
from foveate.core.selection import Selection, SpanSelection
from foveate.core.tokens import Span
from foveate.engines.settings import Separators, Settings
from foveate.engines.transformers.caches import COMPACTION, HELD, cache_of, forget, given_cache, note, noted
from foveate.engines.transformers.callbacks import show_whole_prompts
from foveate.engines.transformers.compaction import Compaction, check_mask, compact_planes, position_behind
from foveate.engines.transformers.given import Shown, given
from foveate.engines.transformers.in_llm import Layers, refuse
from foveate.engines.transformers.layer_pass import Pass
from foveate.engines.transformers.reduce import (
    Reduced,
    base_model,
    pad_id,
    reduce_with,
    refuse_vllm,
    rotary_axes,
    shown_to_llm,
    with_positions,
)
from foveate.families import Family, family_of
from foveate.registry import load_reducer

_HANDLE: Final = "_foveate"


def attach(
    model: Any,
    method: str | Path | Method,
    *,
    positions: Positions | None = None,
    separators: Separators = "drop",
    **config: Any,
) -> Handle:
    """Make a model reduce its visual tokens in ``generate`` and ``forward`` until detached.

    Parameters are those of `reduce`. The handle is a context manager.

    Raises
    ------
    AttachError
        If something is attached to the model already.

    Examples
    --------
    >>> with foveate.attach(model, "vispruner", keep=64) as handle:  # doctest: +SKIP
    ...     out = model.generate(**inputs)
    >>> handle.selections[0][0].kept  # doctest: +SKIP
    """
    model = base_model(model)
    refuse_vllm(model, load_reducer(method, **config))
    family = family_of(model)
    settings = Settings.make(method, positions, separators, config, family)
    settings.reducer.check(model, family)
    return Handle(model, family, settings)


def attached(model: Any) -> Handle | None:
    """Return the handle that is attached to a model, if any."""
    handle: Handle | None = vars(model).get(_HANDLE)
    return handle


class Handle:
    """A live attachment.

    ``generate`` is wrapped on the instance, so that prompt ids come back whole and later turns on the same cache fit;
    ``forward`` is served by hooks, and its logits have the compact length.
    """

    def __init__(self, model: Any, family: Family, settings: Settings):
        if (other := attached(model)) is not None:
            raise AttachError(
                f"{other.reducer!r} is attached to this model already: detach it first, or attach a Chain of both"
            )
        self.settings: Settings = settings
        self.selection: Selection | None = None
        self._batch = 0
        self._pass: Pass | None = None
        self._layers = Layers(model, family, settings.inside, settings.inside_positions) if settings.inside else None
        self._model, self._family = model, family
        self._local = threading.local()
        self._before = model.__dict__.get("generate")
        self._generate: Callable[..., Any] = model.generate
        self._wrapper = self._wrapped_generate
        model.generate = self._wrapper
        setattr(model, _HANDLE, self)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    @property
    def reducer(self) -> Method:
        """The attached method."""
        return self.settings.reducer

    @property
    def selections(self) -> list[list[SpanSelection]]:
        """What the last call with images kept, per prompt and span; of methods inside the LLM in its last layer."""
        if self._pass is not None:
            rows = self._pass.selections()
            return rows[:: len(rows) // max(self._batch, 1)]
        return [] if self.selection is None else self.selection.by_prompt(self._batch)

    @property
    def layers(self) -> dict[int, list[list[SpanSelection]]]:
        """What methods inside the LLM left of the last call's images: the `selections` from each of these layers on."""
        if self._pass is None:
            return {}
        rows = {boundary: self._pass.selections(left) for boundary, left in self._pass.cuts}
        return {boundary: each[:: len(each) // max(self._batch, 1)] for boundary, each in rows.items()}

    @property
    def received(self) -> list[list[int]]:
        """The visual tokens that each layer of the LLM received of each prompt of the last call."""
        chosen, cuts = self.selections, self.layers
        depth = self._model.config.get_text_config().num_hidden_layers
        if self.selection is None:
            left = [sum(span.length for span in row) for row in chosen]
        else:
            left = [sum(map(len, row)) for row in self.selection.by_prompt(self._batch)]
        rows: list[list[int]] = [[] for _ in chosen]
        for layer in range(depth):
            left = [sum(map(len, row)) for row in cuts[layer]] if layer in cuts else left
            for row, count in zip(rows, left, strict=True):
                row.append(count)
        return rows

    def expect(self, shown: Shown) -> None:
        """Say what the next call gives the LLM, where its inputs are encoded already."""
        self._local.shown = shown
        self._batch = shown.batch

    @contextmanager
    def scored(self, scores: Sequence[Tensor]) -> Iterator[None]:
        """Hand scores to a method inside the LLM that ranks tokens by those of somebody else, such as `SGL`.

        Parameters
        ----------
        scores
            Per prompt with images ``[n]``: the score of each of its visual tokens, for calls in the body of the
            ``with`` statement on this thread.

        Raises
        ------
        InputError
            If they are no such tensors, or some score is NaN, which has no rank.
        """
        rows = list(scores)
        for i, row in enumerate(rows):
            if not isinstance(row, Tensor) or row.dim() != 1 or row.is_complex():
                what = f"a tensor of shape {tuple(row.shape)}" if isinstance(row, Tensor) else f"a {type(row).__name__}"
                raise InputError(f"scores are one real tensor [n] per prompt with images, but [{i}] is {what}")
            if row.isnan().any():
                raise InputError(f"scores [{i}] of a prompt with images have NaN, which has no rank: pass numbers")
        self._local.scores = rows
        try:
            yield
        finally:
            self._local.scores = None

    def _scores(self, spans: Sequence[Span], kept: Selection | None = None) -> dict[InLlmReducer, list[Tensor]]:
        """Return the scores that `scored` was given, per span those of the tokens that are left."""
        scores = getattr(self._local, "scores", None)
        readers = [r for r in self.settings.inside if r.guided]
        if scores is None or not readers:
            return {}
        rows: dict[int, list[int]] = {}
        for span in spans:
            rows.setdefault(span.sample, []).append(len(span))
        if [len(x) for x in scores] != [sum(lengths) for lengths in rows.values()]:
            raise InputError(
                f"scores for {[len(x) for x in scores]} visual tokens, but the prompts with images have "
                f"{[sum(lengths) for lengths in rows.values()]}: pass one score per visual token"
            )
        parts = [part.float() for x, lengths in zip(scores, rows.values(), strict=True) for part in x.split(lengths)]
        if kept is not None:
            parts = [c.anchors(part) for part, c in zip(parts, kept, strict=True)]
        return dict.fromkeys(readers, parts)

    def detach(self) -> None:
        """Restore the model exactly. Detaching twice does no harm."""
        if attached(self._model) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        if self._layers is not None:
            self._layers.remove()
        delattr(self._model, _HANDLE)
        if vars(self._model).get("generate") is not self._wrapper:
            return  # wrapped by somebody since, whose wrapper goes on to the model's own
        del self._model.generate
        if self._before is not None:
            self._model.generate = self._before

    def __getstate__(self) -> Any:
        """Refuse copies: they would reduce by way of this handle, and of this model."""
        raise AttachError(f"a model cannot be copied or pickled while {self.reducer!r} is attached: detach it first")

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _wrapped_generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if attached(self._model) is not self:
            return self._generate(*(() if inputs is None else (inputs,)), *args, **kwargs)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        cache = given_cache(kwargs)
        if self._layers is not None:
            refuse(self._model, kwargs)
        with torch.no_grad():
            reduced = self._reduce_continued(kwargs, cache)
        if reduced.compaction is None:
            return self._run_generate(args, reduced)
        full_ids, width = kwargs["input_ids"], reduced["input_ids"].shape[1]
        self._shorten_limits(reduced, full_ids.shape[1] - width)
        show_whole_prompts(reduced, full_ids, width)
        out = self._run_generate(args, reduced)
        sequences = out if isinstance(out, Tensor) else out.sequences
        prompts = full_ids.to(sequences.device).repeat_interleave(len(sequences) // len(full_ids), dim=0)
        whole = torch.cat([prompts, sequences[:, width:]], dim=1)
        for used in (cache, cache_of(out)):
            if used is not None:
                note(used, COMPACTION, reduced.compaction)
        if isinstance(out, Tensor):
            return whole
        out.sequences = whole
        return out

    def _run_generate(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._local.inside = True
        try:
            return self._generate(*args, **kwargs)
        finally:
            self._local.inside = False
            self._local.shown = None

    def _shorten_limits(self, kwargs: dict[str, Any], dropped: int) -> None:
        """Let limits on the whole length count the dropped tokens, as without foveate."""
        config = kwargs.get("generation_config")
        config = self._model.generation_config if config is None else config
        changes = {}
        for name, sibling in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            limit = kwargs.get(name)
            limit = getattr(config, name, None) if limit is None else limit
            given = kwargs.get(sibling) is not None or getattr(config, sibling, None) is not None
            if limit and not given:
                changes[name] = max(limit - dropped, 0)
        if changes and kwargs.get("generation_config") is not None:
            kwargs["generation_config"] = copy.deepcopy(config)
        kwargs.update(changes)

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inside = getattr(self._local, "inside", False)
        if inside and self._layers is None:
            return None
        if args:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if not inside:
            reduced = self._reduce_continued(kwargs, given_cache(kwargs))
            self._local.pending = reduced.compaction
            kwargs = dict(reduced)
        if self._layers is not None:
            shown, self._local.shown = getattr(self._local, "shown", None), None
            self._layers.begin(kwargs, shown)
        return (), kwargs

    def _after_forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        pending = getattr(self._local, "pending", None)
        cache = cache_of(output)
        if self._layers is not None and (run := self._layers.end()) is not None and output is not None:
            run.finish(cache)
            if run.prompts:
                self._pass = run
        if not getattr(self._local, "inside", False) and pending is not None and cache is not None:
            note(cache, COMPACTION, pending)

    def _reduce_continued(self, inputs: Mapping[str, Any], cache: Any) -> Reduced:
        """Reduce inputs that may continue a cache whose prompt was reduced before."""
        filled = int(cache.get_seq_length()) if cache is not None else 0
        if not filled:
            forget(cache)
        if self._layers is None and noted(cache, HELD):
            raise InputError(
                "the deep layers of this cache hold fewer tokens than the first ones: attach the method inside the LLM "
                "that filled it, or start with a new cache"
            )
        if (
            self.settings.before is None
            and not any(map(of_encoder, self.settings.inside))
            and not noted(cache, COMPACTION)
        ):
            self._show(inputs, filled)
            if not (filled and self._family.keeps_positions):
                return Reduced(inputs)
        state = noted(cache, COMPACTION) if filled else None
        if state is None and filled and any(inputs.get(key) is not None for key in self._family.inputs):
            state = self._unreduced(inputs, filled)
        if state is None:
            out = self._reduce(inputs, self.settings)
            self._remember(out.selection, inputs.get("input_ids"))
            return out
        ids = inputs["input_ids"]
        if filled < state.width:
            state = state.cropped(filled)
        state = state.expanded(len(ids))
        cached = state.length + filled - state.width  # columns of the full prompt behind the cache
        mask = inputs.get("attention_mask")
        only_new = ids.shape[1] <= cached if mask is None else mask.shape[1] > ids.shape[1]
        head = cached if only_new else state.length
        new = {**inputs, "input_ids": ids if only_new else ids[:, head:]}
        for key in ("attention_mask", "labels", "token_type_ids", "mm_token_type_ids"):
            if isinstance(plane := inputs.get(key), Tensor) and plane.shape[1] == head + new["input_ids"].shape[1]:
                new[key] = plane[:, head:]
        own = new.pop("position_ids", None)
        tail = self._reduce(new, replace(self.settings, positions="compact"))
        self._remember(tail.selection, ids)
        length = new["input_ids"].shape[1]
        kept = tail.compaction or Compaction(
            torch.arange(length, device=ids.device).expand(len(ids), -1), length, padded=False
        )
        prefix = state.then(head - state.length)
        if self._family.keeps_positions:
            positions = self._continued_positions(new, own, prefix)
            kept = replace(kept, behind=position_behind(positions, new.get("attention_mask")))
            inputs = {**inputs, "position_ids": torch.nn.functional.pad(positions, (prefix.length, 0))}
        return self._join(inputs, prefix, kept, tail, only_new)

    def _reduce(self, inputs: Mapping[str, Any], settings: Settings) -> Reduced:
        """Let the methods before the LLM act, and note for those inside it what is left."""
        out = reduce_with(self._model, self._family, inputs, settings)
        if self._layers is not None and out.compaction is not None:
            out.priors = {**out.priors, **self._scores(out.spans, out.selection)}
            self._local.shown = shown_to_llm(inputs, out)
        elif self._layers is not None:
            self._show(inputs, 0)  # the methods before the LLM keep everything
        return out

    def _show(self, inputs: Mapping[str, Any], filled: int) -> None:
        """Note the visual tokens that the LLM is to be given, behind so many columns in a cache."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if all(inputs.get(key) is None for key in self._family.inputs):
            if inputs.get("mm_encoder_outputs") is not None:
                self._remember(None, ids)
            return
        if ids is None:
            raise InputError("a method inside the LLM needs input_ids: inputs_embeds do not show where the images are")
        check_mask(mask, ids.shape[1] if mask is None or not isinstance(mask, Tensor) else mask.shape[-1])
        only_new = ids.shape[1] <= filled if mask is None else mask.shape[1] > ids.shape[1]
        ids = ids if only_new else ids[:, filled:]
        spans = self._family.spans(self._model, {**inputs, "input_ids": ids})
        self._remember(None, ids)
        prompts = given(spans, mask, ids.shape[1], ids.device, priors=self._scores(spans))
        self._local.shown = Shown(prompts, *ids.shape)

    def _unreduced(self, inputs: Mapping[str, Any], filled: int) -> Compaction:
        """Describe a cache that holds whole prompts, of which the handle knows nothing else."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        behind = None
        if self._family.keeps_positions:
            behind = ids.new_full((len(ids),), filled) if mask is None else mask[:, :filled].sum(dim=1)
            deltas = self._family.position_deltas(self._model)
            if deltas is not None and len(ids) % len(deltas) == 0:
                behind = behind + deltas.flatten().to(behind.device).repeat_interleave(len(ids) // len(deltas))
        return Compaction(torch.arange(filled, device=ids.device).expand(len(ids), -1), filled, False, behind)

    def _continued_positions(self, new: Mapping[str, Any], own: Tensor | None, prefix: Compaction) -> Tensor:
        """Return the M-RoPE positions ``[3, B, n]`` of the n columns that follow a cached prompt."""
        batch, length = new["input_ids"].shape
        if own is not None:
            return rotary_axes(own, batch)[..., -length:]
        positions = self._family.positions(self._model, new)
        assert positions is not None
        assert prefix.behind is not None
        positions = positions + prefix.behind.to(positions.device)[:, None]
        mask = new.get("attention_mask")
        return positions if mask is None else positions.masked_fill(mask == 0, 0)

    def _join(
        self, inputs: Mapping[str, Any], prefix: Compaction, kept: Compaction, tail: Reduced, only_new: bool
    ) -> Reduced:
        """Put the compact continuation of a cached prompt together."""
        whole = prefix.followed_by(kept)
        batch, own = len(inputs["input_ids"]), inputs.get("position_ids")
        full = with_positions(inputs, (batch, whole.length), self.settings.positions)
        out = Reduced(compact_planes(full, whole, pad_id(self._model)))
        if only_new:
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
        out.selection, out.compaction = tail.selection, whole
        return out

    def _remember(self, selection: Selection | None, ids: Tensor | None) -> None:
        if ids is not None and (selection is not None or self._layers is not None):
            self.selection, self._batch = selection, len(ids)
