"""What a pruned run must equal: the plain model with the dropped columns hidden, or never there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.probes import ClsToken
from foveate.core.selection import SpanSelection
from foveate.families import family_of
from foveate.families.generic import Generic
from foveate.families.merged import MergedFamily
from foveate.methods import Random, Uniform, VisPruner
from tiny import (
    FAMILIES,
    IMAGE,
    TINIES,
    VIDEO,
    in_depth,
    tiny_of,
)

REDUCERS = [Random(keep=9, seed=2), Uniform(keep=0.2), VisPruner(keep=11)]
POSITIONS = ["original", "compact"]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
both_positions = pytest.mark.parametrize("positions", POSITIONS)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_family_in_depth = pytest.mark.parametrize("family", [pytest.param(f, marks=in_depth(f)) for f in FAMILIES])
every_position = pytest.mark.parametrize(
    ("family", "positions"), [(f, positions) for f in FAMILIES for positions in TINIES[f].positions]
)
every_position_in_depth = pytest.mark.parametrize(
    ("family", "positions"),
    [pytest.param(f, positions, marks=in_depth(f)) for f in FAMILIES for positions in TINIES[f].positions],
)
TOKENS = 9
"""Generated per answer: their logits are those of the prompt's last token and of eight decoded ones."""


def visible_columns(inputs: dict[str, Tensor], selections: list[list[SpanSelection]]) -> list[list[int]]:
    """Return the columns of each row that are neither padding nor dropped."""
    rows = []
    for ids, mask, spans in zip(inputs["input_ids"], inputs["attention_mask"], selections, strict=True):
        visual = ((ids == IMAGE) | (ids == VIDEO)).nonzero().flatten().tolist()
        assert len(visual) == sum(span.length for span in spans)
        dropped, start = set(), 0
        for span in spans:
            kept = set(span.kept.tolist())
            dropped |= {visual[start + i] for i in range(span.length) if i not in kept}
            start += span.length
        rows.append([c for c in range(len(ids)) if mask[c] and c not in dropped])
    return rows


def extended(inputs: dict[str, Tensor], answer: Tensor, answer_type: int = 0) -> dict[str, Tensor]:
    further = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    further["token_type_ids"] = torch.full_like(answer, answer_type)
    return {k: torch.cat([x, further[k]], dim=1) if k in further else x for k, x in inputs.items()}


@torch.no_grad()
def hidden(model: Any, inputs: dict[str, Tensor], selections: list[list[SpanSelection]]) -> Tensor:
    """Return all logits ``[B, L, V]`` of the plain model with a 4-D mask that hides the dropped columns.

    Where recurrent layers would pass them on, the plain LLM runs on the other columns at their positions instead.
    """
    batch, length = inputs["input_ids"].shape
    if not tiny_of(model).masks:
        return _spread_out(inputs, selections, rebuilt(model, inputs, selections, "original"))
    visible = torch.zeros(batch, length, dtype=torch.bool)
    for i, columns in enumerate(visible_columns(inputs, selections)):
        visible[i, columns] = True
    tiny = tiny_of(model)
    mask = tiny.mask(model, inputs, visible)
    positions = tiny.position_ids(model, inputs)
    inputs = {k: x for k, x in inputs.items() if k != "labels"}
    return model(**{**inputs, "attention_mask": mask, "position_ids": positions}).logits


def _spread_out(inputs: dict[str, Tensor], selections: list[list[SpanSelection]], rows: list[Tensor]) -> Tensor:
    logits = rows[0].new_zeros(*inputs["input_ids"].shape, rows[0].shape[-1])
    for i, columns in enumerate(visible_columns(inputs, selections)):
        logits[i, columns] = rows[i]
    return logits


@torch.no_grad()
def embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the embeddings ``[B, L, ...]``, and planes beside them, that the plain model hands to its LLM."""
    caught: list[Tensor] = []
    tiny = tiny_of(model)

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        caught.append(tiny.received(kwargs))

    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        positions = tiny.position_ids(model, inputs)
        model(**{k: x for k, x in inputs.items() if k != "labels"}, position_ids=positions)
    finally:
        hook.remove()
    return caught[0].clone()


def visual_features(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain model's visual embeddings, all images, and all videos, one after the other."""
    embeds, ids = embeddings(model, inputs), inputs["input_ids"]
    embeds = embeds if embeds.dim() == 3 else embeds[:, :, 0]
    found = {kind: embeds[ids == token] for kind, token in (("image", IMAGE), ("video", VIDEO))}
    return {kind: x for kind, x in found.items() if len(x)}


@torch.no_grad()
def unprojected(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return, span by span, what the plain model's projector reads, and behind it the `[CLS]` tokens of the crops."""
    if not tiny_of(model).packs_features:
        family = family_of(model)
        return family.encode(model, inputs, family.spans(model, inputs), (ClsToken(),)).hidden
    inner, spans = model.model, family_of(model).spans(model, inputs)
    towers = {"image": getattr(inner, "vision_tower", None) or getattr(inner, "image_tower", None)}
    towers["video"] = getattr(inner, "video_tower", None)
    leads: dict[str, Tensor] = {}
    hooks = [
        tower.register_forward_hook(
            lambda _module, _args, out, kind=kind: leads.update({kind: out.hidden_states[-2][:, 0]})
        )
        for kind, tower in towers.items()
        if tower is not None
    ]
    projector, inner.multi_modal_projector = inner.multi_modal_projector, torch.nn.Identity()
    try:
        features = visual_features(model, inputs)
    finally:
        inner.multi_modal_projector = projector
        for hook in hooks:
            hook.remove()
    parts = {kind: iter(torch.split(x, [len(s) for s in spans if s.kind == kind])) for kind, x in features.items()}
    return [torch.cat([next(parts[s.kind]), leads[s.kind][[c.encoder_row for c in s.crops]]]) for s in spans]


@torch.no_grad()
def rebuilt(
    model: Any,
    inputs: dict[str, Tensor],
    selections: list[list[SpanSelection]],
    positions: str = "compact",
    merges: str | None = "embeddings",
    given: list[Tensor] | None = None,
) -> list[Tensor]:
    """Return, per row, the logits of the plain LLM on the embeddings of the visible columns alone, without padding.

    Merged tokens are put together from the plain model's embeddings, or from its features and then projected, unless
    the embeddings of all spans are given.
    """
    embeds, ids, tiny = embeddings(model, inputs), inputs["input_ids"], tiny_of(model)
    full = tiny.position_ids(model, inputs) if positions == "original" else None
    if isinstance(family_of(model), MergedFamily | Generic):
        merges = "embeddings"  # its methods see nothing else
    results, features = [], iter(unprojected(model, inputs) if merges == "features" else ())
    spans_given = iter(given or ())
    for i, columns in enumerate(visible_columns(inputs, selections)):
        visual, start = ((ids[i] == IMAGE) | (ids[i] == VIDEO)).nonzero().flatten(), 0
        for span in selections[i]:
            places = visual[start : start + span.length]
            if given is not None:
                embeds[i, places[span.kept]] = next(spans_given)
            elif merges == "features":
                embeds[i, places[span.kept]] = model.model.multi_modal_projector(
                    span.apply(next(features)[: span.length + span.extra])
                )
            elif span.merge is not None:
                embeds[i, places[span.kept]] = span.apply(embeds[i, places])
            start += span.length
        at = torch.arange(len(columns))[None] if full is None else full[..., i : i + 1, columns]
        # Without a mask, gaps between positions would count as borders of packed prompts.
        planes = {"attention_mask": torch.ones(1, len(columns), dtype=torch.long)}
        planes |= {k: x[i, columns][None] for k, x in inputs.items() if k == "token_type_ids"}
        results.append(tiny.logits(model, embeds[i, columns][None], at, **planes)[0])
    return results


def answer_logits(
    model: Any,
    inputs: dict[str, Tensor],
    selections: list[list[SpanSelection]],
    answer: Tensor,
    positions: str,
) -> Tensor:
    """Return the logits ``[B, T, V]`` from which the oracle draws each token of an answer ``[B, T]``."""
    tiny, t = tiny_of(model), answer.shape[1]
    whole = extended(inputs, answer, tiny.answer_type)
    if positions == "original" and tiny.masks:
        return hidden(model, whole, selections)[:, -t - 1 : -1]
    return torch.stack([x[-t - 1 : -1] for x in rebuilt(model, whole, selections, positions)])


def generate(net, inputs, **kwargs):
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return net.generate(**inputs, **{**options, **kwargs})


def answer_of(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def close(a, b, dtype=torch.float32):
    torch.testing.assert_close(a.float(), b.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def check(net, inputs, out, selections, positions, dtype=torch.float32):
    """Compare a generated answer with the oracle, token by token."""
    answer = answer_of(out, inputs)
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    expected = answer_logits(net, inputs, selections, answer, positions)
    close(torch.stack(out.logits, dim=1), expected, dtype)
