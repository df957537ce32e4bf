"""The transformers engine: `reduce` as a pure function, `attach` for models in use."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from foveate.engines.compaction import Compaction, compact_planes, full_positions, plan
from foveate.errors import AttachError, InputError, UnsupportedModelError
from foveate.families import Family, family_of
from foveate.reducer import Positions, Reducer, identity, load_reducer
from foveate.selection import Merge, Selection, SpanSelection
from foveate.tokens import Span, VisualTokens

Separators: TypeAlias = Literal["drop", "keep", "nonempty"]


class Reduced(dict[str, Any]):
    """Model inputs after reduction, ready for ``model(**inputs)`` and ``model.generate(**inputs)``.

    Attributes
    ----------
    selection
        What was kept, or `None` if the inputs held nothing to reduce.
    compaction
        How compact columns map to those of the full prompt, or `None` if the inputs are unchanged.
    """

    selection: Selection | None = None
    compaction: Compaction | None = None


@dataclass(frozen=True)
class Settings:
    """How an engine applies selections.

    Attributes
    ----------
    reducer
        The method.
    positions
        ``"original"``: kept tokens and the text after them keep the position ids of the full prompt. ``"compact"``:
        the prompt is numbered anew, as if the dropped tokens had never been there.
    separators
        Tokens of a reduced span that no method selects from, such as newline vectors and the ``[CLS]`` tokens of
        video frames: ``"drop"`` them (as papers count), ``"keep"`` them all, or keep the ``"nonempty"`` ones,
        which close a row that still has a token.
    """

    reducer: Reducer
    positions: Positions
    separators: Separators = "drop"

    @classmethod
    def make(
        cls,
        method: str | Path | Reducer,
        positions: Positions | None,
        separators: Separators,
        config: Mapping[str, Any],
    ) -> Settings:
        reducer = load_reducer(method, **config)
        if reducer.stage not in ("pixels", "before_llm"):
            raise UnsupportedModelError(f"{reducer.name} acts at the stage {reducer.stage!r}, which this engine lacks")
        if positions not in (None, "original", "compact"):
            raise InputError(f"positions are 'original' or 'compact', not {positions!r}")
        if separators not in ("drop", "keep", "nonempty"):
            raise InputError(f"separators are 'drop', 'keep' or 'nonempty', not {separators!r}")
        if reducer.stage == "pixels" and separators != "drop":
            raise InputError(f"{reducer.name} encodes smaller pictures, which have no separators: use 'drop'")
        return cls(reducer, positions or reducer.positions, separators)


def reduce(
    model: Any,
    inputs: Mapping[str, Any],
    method: str | Path | Reducer,
    *,
    positions: Positions | None = None,
    separators: Separators = "drop",
    **config: Any,
) -> Reduced:
    """Encode the images of some model inputs, and return inputs that hold only the kept visual tokens.

    The model is not touched: the result goes into the plain ``model.generate`` or ``model.forward``. Gradients flow to
    the projector and the tower; call it under `torch.no_grad` where they are not wanted.

    Parameters
    ----------
    model
        A `transformers` model of a supported family.
    inputs
        What its processor returned: ``input_ids`` ``[B, L]``, ``pixel_values``, optionally masks and labels.
    method
        A reducer, the name of one (its parameters follow as keywords), or a JSON file that `Reducer.save` wrote.
    positions, separators
        See `Settings`. Positions default to those of the method's paper.

    Returns
    -------
    Reduced
        The same keys without pixels, with ``mm_encoder_outputs``. A budget that covers everything, and inputs without
        images, come back unchanged.

    Raises
    ------
    UnsupportedModelError
        If the model belongs to no supported family.
    InputError
        If placeholders and images do not match.
    """
    model = _base(model)
    settings = Settings.make(method, positions, separators, config)
    return _reduce(model, family_of(model), inputs, settings)


def _reduce(model: Any, family: Family, inputs: Mapping[str, Any], settings: Settings) -> Reduced:
    out = Reduced(inputs)
    if all(inputs.get(key) is None for key in family.inputs):
        return out
    if inputs.get("input_ids") is None:
        raise InputError("reduction needs input_ids beside the pixels; inputs_embeds do not show where the images are")
    spans = family.spans(model, inputs)
    if settings.reducer.keeps_all(spans):
        out.selection = identity(spans)
        return out
    selection, embeds = select(model, family, inputs, spans, settings)
    return apply(model, family, inputs, spans, selection, embeds, settings.positions)


def select(
    model: Any, family: Family, inputs: Mapping[str, Any], spans: Sequence[Span], settings: Settings
) -> tuple[Selection, list[Tensor]]:
    """Encode and decide: the selection, and the embeddings ``[K, D]`` of each span."""
    reducer = settings.reducer
    if reducer.stage == "pixels":
        return _shrink(model, family, inputs, spans, reducer)
    tokens = family.encode(model, inputs, spans, reducer.probes())
    selection = decide(tokens, settings)
    return selection, family.embed(model, tokens, selection, reducer.merges)


@torch.no_grad()
def decide(tokens: VisualTokens, settings: Settings) -> Selection:
    """Run the reducer, then settle the separators of each span."""
    chosen = settings.reducer.select(tokens)
    return Selection(
        tuple(_with_separators(s, c, settings.separators) for s, c in zip(tokens.spans, chosen, strict=True))
    )


def _with_separators(span: Span, chosen: SpanSelection, policy: Separators) -> SpanSelection:
    separators = span.separators().to(chosen.kept.device)
    whole = len(chosen) == sum(map(len, span.crops))
    if not len(separators) or (policy == "drop" and not whole):
        return chosen
    if policy == "nonempty" and not whole:
        bounds = torch.tensor(span.extents, device=separators.device)
        first, last = torch.searchsorted(chosen.kept, bounds).unbind(dim=1)
        separators = separators[last > first]
    kept = torch.cat([chosen.kept, separators]).sort().values
    merge = chosen.merge
    if merge is not None:
        ranks = torch.searchsorted(kept, chosen.kept)
        merge = Merge(
            torch.cat([ranks[merge.target], torch.searchsorted(kept, separators)]),
            torch.cat([merge.source, separators]),
            torch.cat([merge.weight, torch.ones_like(separators, dtype=merge.weight.dtype)]),
        )
    return replace(chosen, kept=kept, merge=merge)


def _shrink(
    model: Any, family: Family, inputs: Mapping[str, Any], spans: Sequence[Span], reducer: Any
) -> tuple[Selection, list[Tensor]]:
    chosen, embeds = list(identity(spans)), [torch.empty(0)] * len(spans)
    shrunk = [i for i, span in enumerate(spans) if not reducer.keeps_all([span])]
    if len(shrunk) < len(spans):
        tokens = family.encode(model, inputs, spans, ())
        chosen = [replace(c, kept=c.kept.to(tokens.device)) for c in chosen]
        embeds = family.embed(model, tokens, Selection(tuple(chosen)), merges=False)
    plans = [reducer.plan(spans[i]) for i in shrunk]
    rows = family.encode_at(model, inputs, [spans[i] for i in shrunk], [[grid for grid, _ in plan] for plan in plans])
    for i, crops, parts in zip(shrunk, plans, rows, strict=True):
        span = spans[i]
        anchors, order = torch.cat([anchors for _, anchors in crops]).sort()
        features = torch.cat(parts)
        chosen[i] = SpanSelection(len(span), anchors.to(features.device), sample=span.sample, kind=span.kind)
        embeds[i] = family.project(model, features.index_select(0, order.to(features.device)))
    return Selection(tuple(chosen)), embeds


def apply(
    model: Any,
    family: Family,
    inputs: Mapping[str, Any],
    spans: Sequence[Span],
    selection: Selection,
    embeds: Sequence[Tensor],
    positions: Positions,
) -> Reduced:
    """Compact all planes of the inputs together and hand the embeddings over."""
    compaction = plan(inputs["input_ids"], inputs.get("attention_mask"), spans, selection)
    full = _with_positions(inputs, inputs["input_ids"].shape, positions)
    out = Reduced(compact_planes(full, compaction, _pad_id(model)))
    for key in (*family.inputs, *family.side_inputs):
        out.pop(key, None)
    out["mm_encoder_outputs"] = family.encoder_outputs(spans, embeds)
    out.selection, out.compaction = selection, compaction
    return out


def _with_positions(inputs: Mapping[str, Any], shape: Sequence[int], positions: Positions) -> dict[str, Any]:
    full = dict(inputs)
    if full.get("position_ids") is None:
        full.pop("position_ids", None)
        if positions == "original":
            device = inputs["input_ids"].device
            full["position_ids"] = full_positions(inputs.get("attention_mask"), shape[0], shape[1], device)
    elif positions == "compact":
        raise InputError("position_ids number the full prompt: leave them out, or use positions='original'")
    return full


def _pad_id(model: Any) -> int:
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        pad = getattr(config, "pad_token_id", None)
        if pad is not None:
            return int(pad)
    return 0


def _base(model: Any) -> Any:
    """Return the model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach(
    model: Any,
    method: str | Path | Reducer,
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
    model = _base(model)
    return Handle(model, family_of(model), Settings.make(method, positions, separators, config))


_handles: WeakKeyDictionary[nn.Module, Handle] = WeakKeyDictionary()


class Handle:
    """A live attachment.

    ``generate`` is wrapped on the instance, so that prompt ids come back whole and later turns on the same cache fit;
    ``forward`` is served by hooks, and its logits have the compact length.
    """

    def __init__(self, model: Any, family: Family, settings: Settings):
        if model in _handles:
            raise AttachError(
                f"{_handles[model].settings.reducer!r} is attached to this model already: detach it first, "
                "or attach a Chain of both"
            )
        self.settings: Settings = settings
        self.selection: Selection | None = None
        self._batch = 0
        self._model, self._family = model, family
        self._caches: WeakKeyDictionary[Any, Compaction] = WeakKeyDictionary()
        self._local = threading.local()
        self._before = model.__dict__.get("generate")
        self._generate: Callable[..., Any] = model.generate
        model.generate = self._wrapped_generate
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        _handles[model] = self

    @property
    def reducer(self) -> Reducer:
        """The attached method."""
        return self.settings.reducer

    @property
    def selections(self) -> list[list[SpanSelection]]:
        """What the last call with images kept, per prompt and span."""
        return [] if self.selection is None else self.selection.by_prompt(self._batch)

    def detach(self) -> None:
        """Restore the model exactly. Detaching twice does no harm."""
        if _handles.get(self._model) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        del self._model.generate
        if self._before is not None:
            self._model.generate = self._before
        del _handles[self._model]

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _wrapped_generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if inputs is not None:
            kwargs["input_ids"] = inputs
        cache = kwargs.get("past_key_values")
        with torch.no_grad():
            reduced = self._reduce_continued(kwargs, cache)
        if reduced.compaction is None:
            return self._run_generate(args, reduced)
        full_ids, width = kwargs["input_ids"], reduced["input_ids"].shape[1]
        self._shorten_limits(reduced, full_ids.shape[1] - width)
        if reduced.get("streamer") is not None:
            reduced["streamer"] = _WholePrompt(reduced["streamer"], full_ids)
        out = self._run_generate(args, reduced)
        sequences = out if isinstance(out, Tensor) else out.sequences
        prompts = full_ids.to(sequences.device).repeat_interleave(len(sequences) // len(full_ids), dim=0)
        whole = torch.cat([prompts, sequences[:, width:]], dim=1)
        for used in (cache, getattr(out, "past_key_values", None)):
            if used is not None:
                self._caches[used] = reduced.compaction
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
        if getattr(self._local, "inside", False):
            return None
        if args:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        reduced = self._reduce_continued(kwargs, kwargs.get("past_key_values"))
        self._local.pending = reduced.compaction
        return (), dict(reduced)

    def _after_forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        pending = getattr(self._local, "pending", None)
        cache = getattr(output, "past_key_values", None)
        if not getattr(self._local, "inside", False) and pending is not None and cache is not None:
            self._caches[cache] = pending

    def _reduce_continued(self, inputs: Mapping[str, Any], cache: Any) -> Reduced:
        """Reduce inputs that may continue a cache whose prompt was reduced before."""
        filled = cache.get_seq_length() if cache is not None else 0
        state = self._caches.get(cache) if filled else None
        if state is None and filled and any(inputs.get(key) is not None for key in self._family.inputs):
            ids = inputs["input_ids"]
            state = Compaction(torch.arange(filled, device=ids.device).expand(len(ids), -1), filled, padded=False)
        if state is None:
            out = _reduce(self._model, self._family, inputs, self.settings)
            self._remember(out.selection, inputs.get("input_ids"))
            return out
        ids = inputs["input_ids"]
        state = state.expanded(len(ids))
        cached = state.length + cache.get_seq_length() - state.width  # columns of the full prompt behind the cache
        mask = inputs.get("attention_mask")
        only_new = ids.shape[1] <= cached if mask is None else mask.shape[1] > ids.shape[1]
        head = cached if only_new else state.length
        new = {**inputs, "input_ids": ids if only_new else ids[:, head:]}
        for key in ("attention_mask", "labels", "token_type_ids", "mm_token_type_ids"):
            if isinstance(plane := inputs.get(key), Tensor) and plane.shape[1] == head + new["input_ids"].shape[1]:
                new[key] = plane[:, head:]
        new.pop("position_ids", None)
        tail = _reduce(self._model, self._family, new, replace(self.settings, positions="compact"))
        self._remember(tail.selection, ids)
        length = new["input_ids"].shape[1]
        kept = tail.compaction or Compaction(
            torch.arange(length, device=ids.device).expand(len(ids), -1), length, padded=False
        )
        prefix = state.then(head - state.length)
        return self._join(inputs, prefix, kept, tail, only_new)

    def _join(
        self, inputs: Mapping[str, Any], prefix: Compaction, kept: Compaction, tail: Reduced, only_new: bool
    ) -> Reduced:
        """Put the compact continuation of a cached prompt together."""
        whole = prefix.followed_by(kept)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        full = dict(inputs)
        if full.get("position_ids") is None and self.settings.positions == "original":
            full["position_ids"] = full_positions(mask, len(ids), whole.length, ids.device)
        out = Reduced(compact_planes(full, whole, _pad_id(self._model)))
        if only_new:
            out["input_ids"] = tail["input_ids"]
            if out.get("position_ids") is not None:
                out["position_ids"] = out["position_ids"][..., -kept.width :]
        for key in (*self._family.inputs, *self._family.side_inputs):
            if key not in tail:
                out.pop(key, None)
        if "mm_encoder_outputs" in tail:
            out["mm_encoder_outputs"] = tail["mm_encoder_outputs"]
        out.selection, out.compaction = tail.selection, whole
        return out

    def _remember(self, selection: Selection | None, ids: Tensor | None) -> None:
        if selection is not None and ids is not None:
            self.selection, self._batch = selection, len(ids)


class _WholePrompt(BaseStreamer):  # type: ignore[misc]
    """Shows a streamer the full prompt where the model was given the compact one."""

    def __init__(self, streamer: BaseStreamer, prompt: Tensor):
        self._streamer, self._prompt = streamer, prompt

    def put(self, value: Tensor) -> None:
        self._streamer.put(value if self._prompt is None else self._prompt.cpu())
        self._prompt = None  # type: ignore[assignment]

    def end(self) -> None:
        self._streamer.end()
