"""Checks of what a model says: unchanged where everything is kept, and as if dropped tokens had been hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from foveate.bench import arms
from foveate.check.oracle import Cuts, oracle_logits, other_kernel
from foveate.check.subjects import KEEP, Subject, answers_for
from foveate.check.verdicts import WRONG, Verdict
from foveate.core.reducer import Method
from foveate.core.selection import SpanSelection
from foveate.engines.settings import Settings
from foveate.engines.transformers.attach import attach_with
from foveate.measure.job import Job
from foveate.registry import load_reducer

STEPS: Final = 5
"""Logits compared of each answer: those of the prompt's last token, and of four decoded ones."""
FACTOR: Final = 4.0
"""How many times the noise that was measured may a result be off."""


class Dictated(LogitsProcessor):  # type: ignore[misc]
    """Makes ``generate`` say given answers ``[B, T]``, so that no near tie sends two runs different ways."""

    def __init__(self, answers: Tensor):
        self._words = iter(answers.unbind(dim=1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        words = next(self._words).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, words[:, None], 0.0)


@dataclass(frozen=True, eq=False)
class Run:
    """What a run came to: logits ``[B, T, V]`` in float32, and what was kept, by the layers that see no more."""

    logits: Tensor
    cuts: Cuts


@torch.no_grad()
def run(job: Job, settings: Settings | None, answers: Tensor) -> Run:
    """Let a model with a method attached, or plain, say some answers by ``generate``."""
    options = {"max_new_tokens": answers.shape[1], "do_sample": False, "num_beams": 1, "use_cache": True}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    options["logits_processor"] = LogitsProcessorList([Dictated(answers)])
    if settings is None:
        out = job.model.generate(**job.inputs, **options)
        return Run(torch.stack(out.logits, dim=1).float(), {})
    with attach_with(job.model, job.family, settings) as handle:
        out = job.model.generate(**job.inputs, **options)
        cuts: dict[int, Any] = dict(handle.layers) if settings.inside else {0: handle.selections}
    return Run(torch.stack(out.logits, dim=1).float(), cuts)


def settings_of(subject: Subject, reducer: Method) -> Settings:
    """Return how a method is applied where what it drops can be compared with what is hidden."""
    return Settings.make(reducer, "original", family=subject.family)


def unchanged(subject: Subject, reducer: Method) -> Verdict:
    """Compare the model with a method that keeps everything attached with the plain one: every bit."""
    check, job = f"keep all, {reducer.name}", subject.pair
    answers = answers_for(job, STEPS)
    plain, again = run(job, None, answers).logits, run(job, None, answers).logits
    if not torch.equal(plain, again):
        return Verdict(check, "not run", f"the plain model differs from itself by {_largest(plain, again):.2g}")
    whole = load_reducer(reducer, keep=1.0)
    ours = run(job, Settings.make(whole, family=subject.family), answers).logits
    if torch.equal(plain, ours):
        return Verdict(check, "right", f"bit-identical, {STEPS} tokens of each answer")
    return Verdict(check, WRONG, f"logits differ by {_largest(plain, ours):.2g}")


def as_hidden(subject: Subject, reducer: Method) -> Verdict:
    """Compare a pruned run of a padded batch with the oracle, within the noise of the oracle itself.

    The noise is how far the oracle is off with another attention kernel, and with each prompt by itself: both compute
    the same in another order. So that agreement means something, the oracle that hides other tokens must be further
    away than the noise allows.
    """
    check, job = f"pruned as hidden, {reducer.name}", subject.pair
    answers = answers_for(job, STEPS)
    found = run(job, settings_of(subject, reducer), answers)
    due = oracle_logits(job, found.cuts, answers)
    with other_kernel(subject.model):
        spreads = {"kernel": _largest(due, oracle_logits(job, found.cuts, answers))}
    alone = [
        oracle_logits(one, {b: [rows[i]] for b, rows in found.cuts.items()}, answers[i : i + 1])
        for i, one in enumerate(subject.jobs)
    ]
    spreads["batch"] = _largest(due, torch.cat(alone))
    other = oracle_logits(job, {b: _others(rows) for b, rows in found.cuts.items()}, answers)
    kept = {b: [[len(span) for span in spans] for spans in rows] for b, rows in found.cuts.items()}
    dropped = any(len(span) < span.length for rows in found.cuts.values() for spans in rows for span in spans)
    if not dropped:
        return Verdict(check, "not run", "the method drops nothing of these prompts")
    return _within(check, subject, _largest(found.logits, due), due, spreads, _largest(due, other), {"kept": kept})


def alone_as_in_batch(subject: Subject, reducer: Method) -> Verdict:
    """Compare each prompt of a padded batch with the same prompt by itself: what is kept, and the logits.

    The method decides by place alone, so that rounding in the vision encoder, which no batch size spares, has no say
    in what is kept.
    """
    check, job = f"alone as in a batch, {reducer.name}", subject.pair
    answers, settings = answers_for(job, STEPS), settings_of(subject, reducer)
    batch, plain = run(job, settings, answers), run(job, None, answers)
    alone, plain_alone = [], []
    for i, one in enumerate(subject.jobs):
        single = run(one, settings, answers[i : i + 1])
        for boundary, rows in batch.cuts.items():
            if _kept(rows[i]) != _kept(single.cuts[boundary][0]):
                return Verdict(check, WRONG, f"prompt {i + 1} keeps other tokens alone than in a batch")
        alone.append(single.logits)
        plain_alone.append(run(one, None, answers[i : i + 1]).logits)
    spreads = {"plain model": _largest(plain.logits, torch.cat(plain_alone))}
    error, signal = _largest(batch.logits, torch.cat(alone)), _largest(batch.logits, plain.logits)
    return _within(check, subject, error, plain.logits, spreads, signal, {})


def by_place(subject: Subject, inside: bool) -> Method:
    """Return a method that reads nothing: before the LLM, or where the one for the model acts inside it."""
    if not inside:
        return load_reducer("uniform", keep=KEEP)
    settings = settings_of(subject, subject.inside())
    reducer = arms.inside(subject.jobs[0], settings)[1].reducer
    assert reducer is not None
    return reducer


def _within(
    check: str, subject: Subject, error: float, logits: Tensor, spreads: dict[str, float], signal: float, more: Any
) -> Verdict:
    """Judge an error by the noise that was measured, of which one rounding of the largest logit is the least."""
    rounding = float(logits.abs().max()) * torch.finfo(subject.model.dtype).eps
    limit = FACTOR * max(*spreads.values(), rounding)
    figures = {"error": error, "limit": limit, "noise": {**spreads, "rounding": rounding}, "signal": signal, **more}
    rounded = {key: _rounded(value) for key, value in figures.items()}
    said = f"off by {error:.2g}, at most {limit:.2g} is noise; other tokens come to {signal:.2g}"
    if not error <= limit:  # so that NaN is no agreement
        return Verdict(check, WRONG, said, rounded)
    if signal <= limit:
        return Verdict(check, "not run", f"{said}: this model does not tell tokens apart", rounded)
    return Verdict(check, "right", said, rounded)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(x) for key, x in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _kept(spans: Sequence[SpanSelection]) -> list[list[int]]:
    return [span.kept.tolist() for span in spans]


def _others(rows: Sequence[Sequence[SpanSelection]]) -> list[list[SpanSelection]]:
    """Return selections of as many tokens, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    return [
        [
            SpanSelection(span.length, torch.randperm(span.length, generator=generator)[: len(span)].sort().values)
            for span in spans
        ]
        for spans in rows
    ]
