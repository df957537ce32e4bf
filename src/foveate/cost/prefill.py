"""The cost of a prefill with a method of any stage, or without one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from math import isqrt
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.encoder import EncoderReducer
from foveate.core.grids import crop_budgets
from foveate.core.in_llm import tokens_in_layers
from foveate.core.probes import Embeddings
from foveate.core.reducer import Method, Reducer
from foveate.cost.anatomy import Anatomy
from foveate.cost.flops import Cost, Patches, default_rows, prefill_flops, probe_flops
from foveate.cost.formulas import PerLayer
from foveate.cost.imagined import imagined_tokens
from foveate.cost.overhead import inside_flops
from foveate.cost.work import Work, encoder_flops
from foveate.engines.pipeline import probes_of
from foveate.engines.settings import before_llm, inside_llm
from foveate.families.layout import Grid
from foveate.methods.chain import Chain

M = TypeVar("M", bound=Method)


def arm_cost(
    anatomy: Anatomy, work: Work, text_tokens: int, reducer: Method | None, kept: PerLayer, decision: int = 0
) -> Cost:
    """Count a prefill, stock or as foveate's engine runs it.

    Parameters
    ----------
    reducer
        The method; `None` for the stock model, which runs its whole tower, as it does if the method acts inside the
        LLM alone.
    kept
        Visual tokens that the LLM gets, or that each of its layers gets.
    decision
        FLOPs of the method's decision.
    """
    reducer = None if reducer is None else _before(reducer)
    rows: Sequence[Patches] = work.rows(anatomy)
    windows, vision, projected, probes = work.windows(anatomy), work.encoder_flops, work.projected(anatomy), 0
    if reducer is not None:
        first = kept if isinstance(kept, int) else kept[0]
        all_projected = reducer.merges == "embeddings" or Embeddings() in reducer.needs
        if anatomy.family.projects_kept:
            projected = work.tokens if all_projected else first
        if reducer.stage == "pixels":
            small = shrunk(anatomy, work, reducer)
            rows, windows, vision = (
                [math.prod(grid) for grid in small.pictures],
                small.windows(anatomy),
                small.encoder_flops,
            )
            projected = small.projected(anatomy) if small.pictures and not anatomy.family.projects_kept else first
        elif isinstance(reducer, EncoderReducer):
            rows = encoder_rows(anatomy, work, reducer)
        else:
            probes = probe_flops(anatomy, probes_of([reducer]), work.rows(anatomy), windows)
    return prefill_flops(
        anatomy, work.tokens, text_tokens, kept, rows=rows, windows=windows, vision=vision, projected=projected,
        early_exit=reducer is not None and anatomy.family.projects_kept, selection=probes + decision,
    )  # fmt: skip


def shrunk(anatomy: Anatomy, work: Work, reducer: Method) -> Work:
    """Return the work that a method of the stage ``"pixels"`` leaves: smaller pictures, each by itself."""
    pictures: list[Grid] = []
    if anatomy.tower is None:
        vision = 0
        for span in work.spans:
            for (small, _), (rows, columns) in zip(reducer.plan(span), [span.grid[1:]] * len(span.crops), strict=True):  # type: ignore[attr-defined]
                height, width = work.size[0] // rows * small[0], work.size[1] // columns * small[1]
                vision += encoder_flops(anatomy, {"pixel_values": torch.empty(1, 3, height, width, device="meta")})
        return Work((), work.spans, 0, vision)
    for span in work.spans:
        side = isqrt(anatomy.merges) * anatomy.family.pooled_side(anatomy.model, span.kind)
        pictures += [(h * side, w * side) for (h, w), _ in reducer.plan(span)]  # type: ignore[attr-defined]
    return Work(tuple(pictures), work.spans)


def encoder_rows(anatomy: Anatomy, work: Work, reducer: EncoderReducer) -> list[Patches]:
    """Return the tokens of each picture in each layer of the vision tower that runs."""
    assert anatomy.tower is not None
    patches = math.prod(work.pictures[0]) if work.pictures else default_rows(anatomy, work.tokens)[0]
    rows: list[Patches] = []
    for span in work.spans:
        for crop, _, count in crop_budgets(span, reducer.keep, reducer.name):
            padding = patches - len(crop)
            lengths = reducer.lengths(len(crop), count, anatomy.tower.read)
            rows.append([(padding + a, padding + b) for a, b in lengths])
    return rows


def decided(anatomy: Anatomy, work: Work, reducer: Method, text_tokens: int) -> tuple[PerLayer, int]:
    """Find out how many visual tokens a method keeps, and the FLOPs of its decision, without any image.

    Methods before the LLM decide once on random tokens of the sizes that the model would give them, and what they
    multiply is counted: it depends on sizes, not on values, but for methods with data-dependent loops. Of adaptive
    methods it is the most that they may keep.

    Returns
    -------
    tuple
        The number that the LLM gets, or that each of its layers gets with methods inside it, and the FLOPs.
    """
    inside = inside_llm(reducer)
    before = _before(reducer)
    lengths, flops = [len(span) for span in work.spans], 0
    if before is not None and not before.keeps_all(work.spans):
        lengths, flops = _decided_before(anatomy, work, before, text_tokens)
    if not inside:
        return sum(lengths), flops
    depth = len(anatomy.decoder)
    images = [(span.kind, n) for span, n in zip(work.spans, lengths, strict=True)]
    layers = tokens_in_layers(inside, depth, images)  # type: ignore[arg-type]
    return layers, flops + inside_flops(anatomy, inside, layers, text_tokens, images)  # type: ignore[arg-type]


def _before(reducer: Method) -> Reducer | Chain | None:
    """Return the part of a method that acts before the LLM; of adaptive ones, what keeps as much as they may."""
    before = before_llm(reducer)
    if isinstance(before, Chain):
        return Chain(*map(_bound, before.reducers))
    return None if before is None else _bound(before)


def _bound(stage: M) -> M:
    if stage.adaptive and any(f.name == "adaptive" for f in fields(stage)):
        return replace(stage, adaptive=False)  # type: ignore[call-arg]
    return stage


def _decided_before(anatomy: Anatomy, work: Work, reducer: Reducer | Chain, text_tokens: int) -> tuple[list[int], int]:
    if reducer.stage == "pixels":
        return [sum(h * w for (h, w), _ in reducer.plan(span)) for span in work.spans], 0  # type: ignore[union-attr]
    if isinstance(reducer, EncoderReducer):
        budgets = (crop_budgets(span, reducer.keep, reducer.name) for span in work.spans)
        return [sum(min(count, len(crop)) for crop, _, count in crops) for crops in budgets], 0
    tokens = imagined_tokens(anatomy, work.spans, probes_of([reducer]), text_tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        chosen = reducer.select(tokens)
    return [len(span) for span in chosen], int(counter.get_total_flops())
