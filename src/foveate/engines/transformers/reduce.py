"""The transformers engine: `reduce`, a pure function from model inputs to smaller model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.core.coverage import SALIENCY, with_coverage
from foveate.core.encoder import EncoderReducer
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.in_llm import InLlmReducer, of_encoder, split
from foveate.core.probes import ClsSimilarity, ClsToken, Features, Probe, Query
from foveate.core.ranking import cosine_matrix
from foveate.core.reducer import Method, Positions, identity
from foveate.core.selection import Merge, Selection, SpanSelection
from foveate.core.tokens import Span, VisualTokens
from foveate.engines.settings import Separators, Settings
from foveate.engines.transformers.compaction import Compaction, compact_planes, full_positions, plan, position_behind
from foveate.engines.transformers.given import Shown, given, priors_of
from foveate.families import Family, family_of
from foveate.registry import get_method, list_methods, load_reducer


class Reduced(dict[str, Any]):
    """Model inputs after reduction, ready for ``model(**inputs)`` and ``model.generate(**inputs)``.

    Attributes
    ----------
    selection
        What was kept, or `None` if the inputs held nothing to reduce.
    compaction
        How compact columns map to those of the full prompt, or `None` if the inputs are unchanged.
    spans
        The visual tokens of the full prompts.
    priors
        What methods inside the LLM make of the tokens that are left, ``[K]`` per span.
    """

    selection: Selection | None = None
    compaction: Compaction | None = None
    spans: tuple[Span, ...] = ()
    priors: Mapping[InLlmReducer, Sequence[Tensor]] = {}


def reduce(
    model: Any,
    inputs: Mapping[str, Any],
    method: str | Path | Method,
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
        A reducer, the name of one (its parameters follow as keywords), or a JSON file that `Method.save` wrote.
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
        If placeholders and images do not match, or if the images are encoded or reduced already.
    """
    model = base_model(model)
    refuse_vllm(model, load_reducer(method, **config))
    family = family_of(model)
    settings = Settings.make(method, positions, separators, config, family)
    if settings.inside:
        raise UnsupportedModelError(
            f"{settings.inside[0].name} acts inside the LLM, and no change of its inputs does the same: use "
            "foveate.attach(model, ...)"
        )
    return reduce_with(model, family, inputs, settings)


def reduce_with(model: Any, family: Family, inputs: Mapping[str, Any], settings: Settings) -> Reduced:
    """Reduce as `reduce` does, with the family and the settings at hand."""
    out = Reduced(inputs)
    if settings.before is not None and inputs.get("mm_encoder_outputs") is not None:
        raise InputError(
            f"the images of these inputs are encoded already, or reduced, and {settings.before.name} acts before that "
            "is done: pass what the processor returned, and several methods as one Chain"
        )
    if all(inputs.get(key) is None for key in family.inputs):
        return out
    if inputs.get("input_ids") is None:
        raise InputError("reduction needs input_ids beside the pixels; inputs_embeds do not show where the images are")
    spans = family.spans(model, inputs)
    before, judging = settings.before, [r for r in settings.inside if of_encoder(r)]
    if not judging and (before is None or before.keeps_all(spans)):
        out.selection = identity(spans)
        return out
    selection, embeds, tokens = select(model, family, inputs, spans, settings)
    out = apply(model, family, inputs, spans, selection, embeds, settings.positions)
    if tokens is not None:
        out.priors = priors_of(judging, tokens, selection)
    return out


def select(
    model: Any, family: Family, inputs: Mapping[str, Any], spans: Sequence[Span], settings: Settings
) -> tuple[Selection, list[Tensor], VisualTokens | None]:
    """Encode and decide before the LLM.

    Returns
    -------
    tuple
        The selection, the embeddings ``[K, D]`` of each span, and what the method saw, if it saw the tokens.
    """
    before, judging = settings.before, [r for r in settings.inside if of_encoder(r)]
    if before is not None and before.stage == "pixels":
        if judging:
            raise InputError(f"{judging[0].name} reads the vision encoder, and cannot follow {before.name}")
        return *_shrink(model, family, inputs, spans, before), None
    tokens = look(model, family, inputs, spans, [r for r in (before, *judging) if r is not None])
    selection = decide(tokens, settings)
    return selection, family.embed(model, tokens, selection, None if before is None else before.merges), tokens


def look(
    model: Any, family: Family, inputs: Mapping[str, Any], spans: Sequence[Span], reducers: Sequence[Method]
) -> VisualTokens:
    """Encode the images of some inputs once, with everything that one of the reducers needs to decide.

    A method of the stage ``"encoder"`` changes the pass itself, and so needs one of its own.
    """
    for reducer in reducers:
        reducer.check(model, family)
        if isinstance(reducer, EncoderReducer):
            if len(reducers) > 1:
                raise InputError(f"{reducer.name} acts inside the vision encoder: look for it alone")
            return family.encode_inside(model, inputs, spans, reducer)
    probes = probes_of(reducers)
    budgets = tuple(dict.fromkeys(budget for reducer in reducers for budget in reducer.coverages()))
    tokens = family.encode(model, inputs, spans, (*probes, ClsToken()) if ClsSimilarity() in probes else probes)
    if ClsSimilarity() in probes:
        tokens = _with_cls_similarity(tokens)
    if Query() in probes:
        tokens = replace(tokens, queries=family.query(model, inputs, spans))
    return with_coverage(tokens, budgets) if budgets else tokens


def _with_cls_similarity(tokens: VisualTokens) -> VisualTokens:
    """Compare the patches of each crop with its ``[CLS]`` token, for the probe `ClsSimilarity`."""
    features, similarity = iter(tokens.probe(Features())), []
    for span, hidden in zip(tokens.spans, tokens.hidden, strict=True):
        for j in range(len(span.crops)):
            patches = next(features).float()
            cls = hidden[len(span) + j].float() if tokens.cls else patches.mean(dim=0)
            similarity.append(cosine_matrix(patches[None], cls[None, None])[0, :, 0])
    return replace(tokens, planes={**tokens.planes, ClsSimilarity(): similarity})


def probes_of(reducers: Sequence[Method]) -> tuple[Probe, ...]:
    """Return the probes that some reducers and their budgets read."""
    probes = dict.fromkeys(probe for reducer in reducers for probe in of_encoder(reducer))
    if any(reducer.coverages() for reducer in reducers):
        probes[SALIENCY] = None
    return tuple(probes)


@torch.no_grad()
def decide(tokens: VisualTokens, settings: Settings) -> Selection:
    """Run the method before the LLM, if there is one, then settle the separators of each span."""
    before = settings.before
    if before is None:
        return Selection(tuple(replace(c, kept=c.kept.to(tokens.device)) for c in identity(tokens.spans)))
    chosen = before.select(tokens)
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
        embeds = family.embed(model, tokens, Selection(tuple(chosen)), None)
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
    family.check_kept(model, selection)
    compaction = plan(inputs["input_ids"], inputs.get("attention_mask"), spans, selection)
    own = family.positions(model, inputs) if positions == "original" and inputs.get("position_ids") is None else None
    full = with_positions(inputs, inputs["input_ids"].shape, positions, own)
    if family.keeps_positions and positions == "original":
        full["position_ids"] = rotary_axes(full["position_ids"], len(inputs["input_ids"]))
        compaction = replace(compaction, behind=position_behind(full["position_ids"], inputs.get("attention_mask")))
    out = Reduced(compact_planes(full, compaction, pad_id(model)))
    for key in (*family.inputs, *family.side_inputs):
        out.pop(key, None)
    if out.get("position_ids") is not None and out.get("attention_mask") is None:
        # Without a mask, transformers takes gaps between positions for the borders of packed prompts.
        out["attention_mask"] = torch.ones_like(out["input_ids"])
    out["mm_encoder_outputs"] = family.encoder_outputs(spans, embeds)
    out.selection, out.compaction, out.spans = selection, compaction, tuple(spans)
    return out


def shown_to_llm(inputs: Mapping[str, Any], reduced: Reduced) -> Shown:
    """Describe to methods inside the LLM what methods before it have left of some inputs."""
    ids, mask = reduced["input_ids"], inputs.get("attention_mask")
    width = inputs["input_ids"].shape[1]
    prompts = given(reduced.spans, mask, width, ids.device, reduced.selection, reduced.compaction, reduced.priors)
    return Shown(prompts, *ids.shape)


def with_positions(
    inputs: Mapping[str, Any], shape: Sequence[int], positions: Positions, own: Tensor | None = None
) -> dict[str, Any]:
    """Return the inputs of full prompts of a shape ``[B, L]`` with the position ids that their tokens are to keep.

    `own` are the family's, if they are not counted along the prompt.
    """
    full = dict(inputs)
    if full.get("position_ids") is None:
        full.pop("position_ids", None)
        if positions == "original":
            device = inputs["input_ids"].device
            counted = full_positions(inputs.get("attention_mask"), shape[0], shape[1], device)
            full["position_ids"] = counted if own is None else own
    elif positions == "compact":
        raise InputError("position_ids number the full prompt: leave them out, or use positions='original'")
    return full


def rotary_axes(positions: Tensor, batch: int) -> Tensor:
    """Return the temporal, vertical and horizontal positions ``[3, B, L]`` among M-RoPE position ids.

    A row in front of them that counts the tokens is left out: with gaps in it, transformers would take one prompt for
    several packed ones.
    """
    axes = positions[-3:] if positions.dim() == 3 else positions[None]
    return axes.expand(3, batch, -1)


def refuse_vllm(model: Any, reducer: Method) -> None:
    """Raise `UnsupportedModelError` for an engine of vLLM, which this one cannot run a method in."""
    if type(model).__module__.partition(".")[0] != "vllm":
        return
    _, inside = split(reducer.stages())
    if inside:
        others = [n for n in list_methods() if n != "chain" and get_method(n).stage == "before_llm"]
        raise UnsupportedModelError(
            f"{inside[0].name} prunes inside the LLM, and vLLM cannot do that: use a method that acts before the LLM: "
            f"{', '.join(others)}; or the transformers model"
        )
    raise UnsupportedModelError(
        "reduce and attach take models of transformers, not engines of vLLM: load the model with transformers"
    )


def pad_id(model: Any) -> int:
    """Return the id that fills padding columns; it is masked, so any will do where the model names none."""
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        pad = getattr(config, "pad_token_id", None)
        if pad is not None:
            return int(pad)
    return 0


def base_model(model: Any) -> Any:
    """Return the model inside a PEFT wrapper, or the model itself."""
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError("torch.compile hides the parts of this model: pass the one that it was made of")
    return model.get_base_model() if hasattr(model, "get_base_model") else model
