"""Checks of how often the host waits for the GPU: never in a selection, and in decoding no more than without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from foveate.check.kept import on, tokens_for
from foveate.check.subjects import Subject
from foveate.check.verdicts import WRONG, Minutes, Verdict, judged
from foveate.core.checks import selected
from foveate.core.reducer import Method, Reducer
from foveate.engines.settings import Settings
from foveate.engines.transformers.attach import attach_with

_SAYS: Final = "called a synchronizing CUDA operation"
_FEW, _MORE = 2, 6
NOT_APPLICABLE: Final = "not applicable on a CPU"


@contextmanager
def counted() -> Iterator[list[str]]:
    """Count how often the host waits for the GPU: the list has, afterwards, the place of each time."""
    places: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            # The mode warns of itself, too, the first time that it is set.
            places += [f"{w.filename}:{w.lineno}" for w in caught if _SAYS in str(w.message)]


def in_selection(
    reducers: Sequence[Method], device: torch.device, grid: tuple[int, int], minutes: Minutes
) -> list[Verdict]:
    """Judge each method that decides before the LLM, with its tokens on the GPU."""
    timed = [r for r in reducers if isinstance(r, Reducer) and r.stage == "before_llm"]
    return [judged(r.name, lambda r=r: _selection(r, device, grid), minutes) for r in timed]  # type: ignore[misc]


def _selection(reducer: Reducer, device: torch.device, grid: tuple[int, int]) -> Verdict:
    tokens = on(tokens_for(reducer, grid), device)
    selected(reducer, tokens)  # what a kernel does when it first runs is no part of a selection
    with counted() as places:
        selected(reducer, tokens)
    figures = {"waits": len(places), "places": sorted(set(places))}
    if places and reducer.adaptive:
        return Verdict(reducer.name, "right", f"{len(places)}: how many tokens stay depends on values", figures)
    if places:
        return Verdict(reducer.name, WRONG, f"waits {len(places)} times, at {', '.join(figures['places'])}", figures)  # type: ignore[arg-type]
    return Verdict(reducer.name, "right", "waits for nothing", figures)


def summary(rows: Sequence[Verdict]) -> Verdict:
    """Return one verdict on the selections of many methods."""
    check, figures = "host waits, selection", {"methods": [row.to_dict() for row in rows]}
    if wrong := [row for row in rows if row.word == WRONG]:
        return Verdict(check, WRONG, "; ".join(f"{row.check} {row.said}" for row in wrong), figures)
    right = [row for row in rows if row.word == "right"]
    if not right:
        return Verdict(check, "not run", rows[0].said if rows else "no method decides on given tokens", figures)
    waiting = [row.check for row in right if row.figures["waits"]]
    kinds = f", but for those whose number of tokens depends on values: {', '.join(waiting)}" * bool(waiting)
    return Verdict(check, "right", f"none in {len(right)} methods{kinds}", figures)


def while_decoding(subject: Subject, reducer: Method) -> Verdict:
    """Compare how often the host waits for each decoded token with and without a method."""
    check = f"host waits, decoding, {reducer.name}"
    settings = Settings.make(reducer, family=subject.family)
    plain = _per_token(subject)
    with attach_with(subject.model, subject.family, settings):
        ours = _per_token(subject)
    figures = {"unpruned": plain, "pruned": ours}
    said = f"{ours:g} per token, {plain:g} unpruned"
    return Verdict(check, "right" if ours <= plain else WRONG, said, figures)


def _per_token(subject: Subject) -> float:
    few, more = (_waits(subject, tokens) for tokens in (_FEW, _MORE))
    return (more - few) / (_MORE - _FEW)


@torch.no_grad()
def _waits(subject: Subject, tokens: int) -> int:
    job: Any = subject.jobs[0]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1}
    job.model.generate(**job.inputs, **options)
    with counted() as places:
        job.model.generate(**job.inputs, **options)
    return len(places)
