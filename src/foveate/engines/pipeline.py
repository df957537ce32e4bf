"""The way of an image to the LLM: look at it, decide which tokens stay, embed these, apply the decision.

Every engine goes this way, and so do the commands that measure. Nothing here knows an engine: it brings the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from foveate.core.ambient import defaults, neutral
from foveate.core.checks import selected
from foveate.core.coverage import SALIENCY, with_coverage
from foveate.core.encoder import EncoderReducer
from foveate.core.errors import InputError
from foveate.core.in_llm import of_encoder
from foveate.core.merges import joined
from foveate.core.probes import ClsSimilarity, ClsToken, Embeddings, Features, Probe, Query
from foveate.core.ranking import cosine_matrix
from foveate.core.rectify import Shares, absorbed, shares_of
from foveate.core.reducer import Method, identity
from foveate.core.selection import Merge, Selection, SpanSelection
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens
from foveate.engines.finite import check_features
from foveate.engines.settings import Separators, Settings
from foveate.families import Family

T = TypeVar("T")


class Meter:
    """What a run reports to; this one takes no notice."""

    def stop(self, stage: str) -> None:
        """End a stage, which began where the one before it ended. A stage may come in several pieces."""

    def decided(self, decision: Decision) -> None:
        """Take note of a decision, before it is applied."""


UNMETERED = Meter()


@dataclass(frozen=True, eq=False)
class Decision:
    """What methods before the LLM made of the images of some prompts.

    Attributes
    ----------
    spans
        The visual tokens of the full prompts.
    selection
        What is kept of each, separators included.
    embeds
        ``[K, D]`` per span: what the LLM gets.
    tokens
        What the methods saw; `None` if they had smaller pictures encoded.
    shares
        What the kept tokens of each span stand for, if the settings ask for it and not all are kept.
    """

    spans: tuple[Span, ...]
    selection: Selection
    embeds: list[Tensor]
    tokens: VisualTokens | None
    shares: tuple[Shares, ...] | None = None


@defaults()
def run(
    model: Any,
    family: Family,
    inputs: Mapping[str, Any],
    spans: Sequence[Span],
    settings: Settings,
    apply: Callable[[Decision], T],
    meter: Meter = UNMETERED,
    seen: VisualTokens | None = None,
) -> T:
    """Take the images of some inputs all the way.

    Parameters
    ----------
    inputs
        What the model's processor returned.
    apply
        Makes the engine's own inputs of a decision.
    meter
        Told the ends of ``"vision"`` (look, embed) and ``"select"`` (decide, apply).
    seen
        What `look` returned for these methods, if somebody has looked before.

    Raises
    ------
    InputError
        If a method inside the LLM reads the vision encoder, of which another one encodes smaller pictures.
    """
    before = settings.before
    if before is not None and before.stage == "pixels":
        if settings.judging:
            raise InputError(f"{settings.judging[0].name} reads the vision encoder, and cannot follow {before.name}")
        decision = _shrink(model, family, inputs, spans, before)
    else:
        tokens = look(model, family, inputs, spans, readers(settings)) if seen is None else seen
        meter.stop("vision")
        selection = decide(tokens, settings)
        meter.stop("select")
        if settings.represents and not selection.is_identity and not _inside_encoder(before):
            tokens = family.with_embeddings(model, tokens, (Embeddings(),)) if tokens.embedded is None else tokens
        embeds = family.embed(model, tokens, selection, None if before is None else before.merges)
        decision = Decision(tuple(spans), selection, embeds, tokens)
    if settings.represents and not decision.selection.is_identity:
        decision = _represented(decision, settings)
    meter.stop("vision")
    meter.decided(decision)
    applied = apply(decision)
    meter.stop("select")
    return applied


def _inside_encoder(method: Method | None) -> bool:
    return isinstance(method, EncoderReducer)


def _represented(decision: Decision, settings: Settings) -> Decision:
    """Work out what the kept tokens stand for, and let them absorb it where this is asked for."""
    embedded = None if decision.tokens is None else decision.tokens.embedded
    found = shares_of(decision.spans, decision.selection, embedded)
    embeds = decision.embeds
    if settings.absorb:
        assert embedded is not None
        pairs = zip(decision.spans, embeds, found, embedded, strict=True)
        embeds = [absorbed(kept, own, rows[: len(span)]) for span, kept, own, rows in pairs]
    return replace(decision, embeds=embeds, shares=found)


@defaults()
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
    tokens = family.encode(model, inputs, spans, probes)
    if tokens.device.type == "cpu":  # elsewhere selection waits for nothing, and pixels alone are checked
        check_features(tokens.spans, tokens.hidden)
    if ClsSimilarity() in probes:
        tokens = with_cls_similarity(tokens)
    if Query() in probes:
        tokens = replace(tokens, queries=family.query(model, inputs, spans))
    return with_coverage(tokens, budgets) if budgets else tokens


@neutral()
def with_cls_similarity(tokens: VisualTokens) -> VisualTokens:
    """Compare the patches of each crop with its ``[CLS]`` token, for the probe `ClsSimilarity`."""
    features, similarity = iter(tokens.probe(Features())), []
    for span, hidden in zip(tokens.spans, tokens.hidden, strict=True):
        for j in range(len(span.crops)):
            patches = next(features).float()
            # SigLIP and the like have no [CLS] token: the mean of the patches stands for it.
            cls = hidden[len(span) + j].float() if tokens.cls else patches.mean(dim=0)
            similarity.append(cosine_matrix(patches[None], cls[None, None])[0, :, 0])
    return replace(tokens, planes={**tokens.planes, ClsSimilarity(): similarity})


def readers(settings: Settings) -> list[Method]:
    """Return the methods that read the vision encoder."""
    return [r for r in (settings.before, *settings.judging) if r is not None]


def probes_of(reducers: Sequence[Method]) -> tuple[Probe, ...]:
    """Return the probes that some reducers and their budgets read, and what these are made of."""
    probes = dict.fromkeys(probe for reducer in reducers for probe in of_encoder(reducer))
    if any(reducer.coverages() for reducer in reducers):
        probes[SALIENCY] = None
    if ClsSimilarity() in probes:
        probes[ClsToken()] = None
    return tuple(probes)


@torch.no_grad()
@defaults()
def decide(tokens: VisualTokens, settings: Settings) -> Selection:
    """Run the method before the LLM, if there is one, then settle the separators of each span."""
    before = settings.before
    if before is None:
        return Selection(tuple(replace(c, kept=c.kept.to(tokens.device)) for c in identity(tokens.spans)))
    chosen = selected(before, tokens)
    return Selection(
        tuple(_with_separators(s, c, settings.separators) for s, c in zip(tokens.spans, chosen, strict=True))
    )


def _with_separators(span: Span, chosen: SpanSelection, policy: Separators) -> SpanSelection:
    separators = span.separators().to(chosen.kept.device)
    whole = len(chosen) == sum(map(len, span.crops))
    # A span that keeps everything keeps its separators too: a budget that covers all changes nothing.
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
        themselves = torch.ones_like(separators, dtype=merge.weight.dtype)
        merge = joined(
            Merge(ranks[merge.target], merge.source, merge.weight),
            Merge(torch.searchsorted(kept, separators), separators, themselves),
        )
    return replace(chosen, kept=kept, merge=merge)


def _shrink(model: Any, family: Family, inputs: Mapping[str, Any], spans: Sequence[Span], reducer: Any) -> Decision:
    """Have smaller pictures encoded of the spans that the method shrinks, and the others as they are."""
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
    return Decision(tuple(spans), Selection(tuple(chosen)), embeds, None)
