"""The main job: ask a model about images or a video without and with visual-token reduction, and measure both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Attention
from foveate.core.reducer import Method, Positions, identity
from foveate.core.selection import Selection
from foveate.core.tokens import VisualTokens
from foveate.cost import Cost, anatomy_of, kv_bytes, work_of
from foveate.cost.overhead import inside_flops
from foveate.cost.prefill import arm_cost
from foveate.engines.pipeline import Decision, decide
from foveate.engines.settings import Separators, Settings, inside_llm
from foveate.engines.transformers.attach import attach_with
from foveate.engines.transformers.reduce import base_model
from foveate.measure.job import Job, Say
from foveate.measure.timing import STAGES, Clock, FirstToken, encoder_reports


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came out of the runs of a job with one method.

    Attributes
    ----------
    reducer
        The method; `None` for the stock model.
    answer
        The decoded text.
    answer_tokens
        Its length; decoding takes time in proportion.
    selection
        What was kept.
    saliency
        The attention that the method read, ``[n]`` per crop, if any.
    seconds
        Median time of each stage and of their sum.
    layers
        The visual tokens that each layer of the LLM receives.
    cost
        FLOPs of the prefill, or `None` if they are not known.
    kv_bytes
        Bytes of the prompt's KV cache.
    """

    reducer: Method | None
    answer: str
    answer_tokens: int
    selection: Selection
    saliency: list[Tensor] | None
    seconds: dict[str, float]
    layers: tuple[int, ...]
    cost: Cost | None
    kv_bytes: int

    @property
    def kept(self) -> int:
        """Number of visual tokens that are left, in the last layer of the LLM."""
        return sum(map(len, self.selection))

    @property
    def equivalent(self) -> float:
        """Mean over the layers of the visual tokens that they receive."""
        return statistics.fmean(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-compatible data."""
        return {
            "method": "unpruned" if self.reducer is None else repr(self.reducer),
            "answer": self.answer,
            "answer_tokens": self.answer_tokens,
            "tokens": self.kept,
            "equivalent_tokens": self.equivalent,
            "flops": None if self.cost is None else self.cost.total,
            "kv_bytes": self.kv_bytes,
            "seconds": self.seconds,
        }


def run_methods(
    job: Job,
    reducers: Sequence[Method | None],
    positions: Positions | None = None,
    separators: Separators = "drop",
    repeats: int = 3,
    say: Say = lambda _: None,
    rectify: float = 0.0,
    absorb: bool = False,
) -> list[Outcome]:
    """Run a job with each reducer, `None` being the stock model, and time the stages.

    Each runs once unmeasured, then all take turns. The attention implementation is the model's own in all of them.

    Parameters
    ----------
    positions, separators, rectify, absorb
        See `foveate.engines.settings.Settings`.
    repeats
        Measured runs of each, of which the median counts.
    say
        Gets a line about what is going on.

    Raises
    ------
    BudgetError
        If there are budgets for more images than the job has.
    """
    for reducer in reducers:
        if reducer is not None:
            reducer.check_images(len(job.spans))
    settings = [
        None if r is None else Settings.make(r, positions, separators, job.family, rectify, absorb) for r in reducers
    ]
    first, times = [], []
    for reducer, setting in zip(reducers, settings, strict=True):
        say(f"warming up {_name(reducer)}")
        first.append(run_once(job, setting, count=True))
    for turn in range(repeats):
        say(f"measuring, turn {turn + 1} of {repeats}")
        times.append([run_once(job, setting).seconds for setting in settings])
    return [
        _outcome(job, reducer, result, [turn[i] for turn in times] or [result.seconds])
        for i, (reducer, result) in enumerate(zip(reducers, first, strict=True))
    ]


@dataclass(frozen=True, eq=False)
class Result:
    """What came out of one run of a job; see `Outcome`.

    Attributes
    ----------
    tokens
        What the methods before the LLM saw, if they saw the tokens.
    given
        The kind and the number of tokens of each image that the LLM was given.
    decision_flops
        Of the methods before the LLM, if they were counted.
    stock
        Whether the model ran as it is.
    """

    answer: str
    answer_tokens: int
    selection: Selection
    tokens: VisualTokens | None
    given: list[tuple[str, int]]
    layers: tuple[int, ...]
    seconds: dict[str, float]
    decision_flops: int
    stock: bool


class _Witness(Clock):
    """A clock that also remembers what was decided before the LLM."""

    decision: Decision | None = None

    def decided(self, decision: Decision) -> None:
        self.decision = decision


@torch.no_grad()
def run_once(
    job: Job, settings: Settings | None, count: bool = False, now: Callable[[], float] = time.perf_counter
) -> Result:
    """Run a job with a method attached, or unpruned, and time the stages.

    Parameters
    ----------
    count
        Also count the FLOPs of the method's decision, which takes time.
    now
        See `foveate.measure.timing.Clock`.
    """
    model, clock, handle = base_model(job.model), _Witness(job.model.device, now), None
    stock = settings is None or settings.reducer.keeps_all(job.spans)
    with ExitStack() as around:
        if settings is not None and not stock:
            handle = around.enter_context(attach_with(model, job.family, settings, clock))
        if settings is None or stock or settings.leaves_alone(job.spans):
            around.enter_context(encoder_reports(model, clock))
        clock.start()
        out = job.model.generate(
            **job.inputs, max_new_tokens=job.max_new_tokens, do_sample=False, num_beams=1, streamer=FirstToken(clock)
        )
        selection = identity(job.spans)
        layers: Sequence[int] = (job.visual_tokens,) * job.depth
        if handle is not None:
            selection, (layers,) = Selection(tuple(handle.selections[0])), handle.received
    decision, new = clock.decision, out[0, job.inputs["input_ids"].shape[1] :]
    return Result(
        answer=job.processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
        answer_tokens=len(new),
        selection=selection,
        tokens=None if decision is None else decision.tokens,
        given=[(left.kind, len(left)) for left in (job.spans if decision is None else decision.selection)],
        layers=tuple(layers),
        seconds=clock.seconds,
        decision_flops=decision_flops(decision, settings) if count else 0,
        stock=stock,
    )


def decision_flops(decision: Decision | None, settings: Settings | None) -> int:
    """Count what a method before the LLM multiplies to decide."""
    if decision is None or decision.tokens is None or settings is None:
        return 0
    with FlopCounterMode(display=False) as counter:
        decide(decision.tokens, settings)
    return int(counter.get_total_flops())


def _outcome(job: Job, reducer: Method | None, result: Result, times: Sequence[dict[str, float]]) -> Outcome:
    seconds = {stage: statistics.median(t[stage] for t in times) for stage in STAGES}
    seconds["total"] = statistics.median(sum(t.values()) for t in times)
    size = torch.finfo(job.model.dtype).bits // 8
    cache = kv_bytes(job.model.config.get_text_config(), [job.text_tokens + n for n in result.layers], size)
    saliency = _saliency(reducer, result.tokens)
    cost = cost_of(job, reducer, result)
    return Outcome(
        reducer, result.answer, result.answer_tokens, result.selection, saliency, seconds, result.layers, cost, cache
    )  # fmt: skip


def cost_of(job: Job, reducer: Method | None, result: Result) -> Cost | None:
    """Return the FLOPs of the prefill of a run, or `None` if they are not known."""
    model = base_model(job.model)
    method = None if result.stock else reducer
    try:
        anatomy = anatomy_of(model.config, type(model))
        work = work_of(anatomy, job.inputs, job.spans)
        inside = () if method is None else inside_llm(method)
        decision = result.decision_flops
        decision += inside_flops(anatomy, inside, result.layers, job.text_tokens, result.given)
        return arm_cost(anatomy, work, job.text_tokens, method, result.layers, decision)
    except UnsupportedModelError:
        return None


def _saliency(reducer: Method | None, tokens: VisualTokens | None) -> list[Tensor] | None:
    if reducer is None or tokens is None:
        return None
    probe = next((p for p in reducer.needs if isinstance(p, Attention)), None)
    if probe is None:
        return None
    return [x.float().cpu() if x.dim() == 1 else x.float().mean(dim=-1).cpu() for x in tokens.probe(probe)]


def _name(reducer: Method | None) -> str:
    return "the unpruned model" if reducer is None else reducer.name
