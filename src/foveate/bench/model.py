"""Time and memory of a whole model: unpruned, with a method, and with the same number of tokens for free."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from foveate.bench import arms as ways
from foveate.bench.arms import Arm
from foveate.bench.memory import MemoryMeter
from foveate.core.errors import UnsupportedModelError
from foveate.cost import prefill_flops
from foveate.engines.settings import Settings
from foveate.engines.transformers.caches import cache_of
from foveate.measure.job import Job, Say
from foveate.measure.provenance import machine, versions
from foveate.measure.timing import STAGES, Clock, check_clock, median_p90

FIRST_TOKEN = ("vision", "select", "prefill")
ClockName: TypeAlias = Literal["wall", "cpu"]
Times = Mapping[str, Sequence[Mapping[str, float]]]
"""Seconds by stage, of each turn, of each arm."""


def arms_of(job: Job, settings: Settings) -> list[Arm]:
    """Make the arms that a method is measured with.

    A method that acts before the LLM is measured beside the unpruned model, the unpruned model with the method
    attached at ratio 1, the oracle, and, for VisPruner on a LLaVA, the naive way. One inside the LLM is attached, and
    so is its oracle, which drops as many tokens at the same layers.
    """
    found = [ways.unpruned(job), ways.control(job, settings)]
    if settings.inside:
        return found + ways.inside(job, settings)
    own, selection = ways.method(job, settings)
    found += [own, ways.oracle(job, settings, selection)]
    if ways.naive_runs(job, settings.reducer):
        found.append(ways.naive(job, settings, len(selection[0])))
    return found


def run_arms(
    arms: Sequence[Arm], repeats: int = 5, clock: ClockName = "wall", say: Say = lambda _: None
) -> dict[str, Any]:
    """Measure arms of one job.

    Every arm runs once for its memory, which warms it up. Then all take turns, each turn beginning with another one, so
    that a machine that slows down slows all of them.

    Parameters
    ----------
    arms
        Of distinct names.
    repeats
        Turns.
    clock
        ``"cpu"`` counts processor time, which other programs on the machine do not lengthen. It is for one thread,
        whose wall-clock time on an idle machine it equals, and for models on the CPU.

    Returns
    -------
    dict
        The configuration of the job, versions and machine, a row per arm, and `comparisons` of the arms.
    """
    job = arms[0].job
    check_clock(clock, job.model.device)
    start = partial(Clock, job.model.device, time.process_time if clock == "cpu" else time.perf_counter)
    memory, caches = {}, {}
    for arm in arms:
        say(f"memory: {arm.name}")
        memory[arm.name], caches[arm.name] = _bytes_of(arm, job.model.device)
    times: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    for turn in range(repeats):
        say(f"turn {turn + 1} of {repeats}")
        first = turn % len(arms)
        for arm in [*arms[first:], *arms[:first]]:
            times[arm.name].append(arm.run(start)[0].seconds)
    rows = [_row(arm, times[arm.name], memory[arm.name], caches[arm.name]) for arm in arms]
    return {
        "config": {
            "visual_tokens": job.visual_tokens, "text_tokens": job.text_tokens, "answer_tokens": job.max_new_tokens,
            "layers": job.depth,
            "dtype": str(job.model.dtype).removeprefix("torch."),
            "attention": job.model.config._attn_implementation, "turns": repeats, "clock": clock,
        },
        "machine": machine(),
        "versions": versions(),
        "arms": rows,
        "comparisons": comparisons(rows, times, job.visual_tokens, job.max_new_tokens - 1),
    }  # fmt: skip


def _bytes_of(arm: Arm, device: torch.device) -> tuple[dict[str, int], int]:
    """Return the peaks of memory of a run by stage, and the size of the KV cache that it leaves."""
    with ExitStack() as stack:

        def meter() -> MemoryMeter:
            return stack.enter_context(closing(MemoryMeter(device)))

        running, out = arm.run(meter)
        return running.peaks(), cache_bytes(cache_of(out))


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a KV cache of transformers."""
    planes = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() for x in planes)


def _row(arm: Arm, times: Sequence[Mapping[str, float]], memory: Mapping[str, int], cache: int) -> dict[str, Any]:
    sums = [{**t, "first_token": _sum(t, FIRST_TOKEN), "total": _sum(t, STAGES)} for t in times]
    return {
        "arm": arm.name,
        "method": None if arm.reducer is None else repr(arm.reducer),
        "tokens": round(arm.tokens, 1),
        "time": {stage: median_p90([t[stage] for t in sums]) for stage in (*STAGES, "first_token", "total")},
        "peak_bytes": dict(memory),
        "kv_bytes": cache,
        "prefill_flops": _prefill_flops(arm),
    }


def _prefill_flops(arm: Arm) -> int | None:
    """FLOPs of the LLM's layers and of the logits of the prompt's last token; `None` if they are not known."""
    job = arm.job
    visual, text, *received = (n // job.prompts for n in (job.visual_tokens, job.text_tokens, *arm.received))
    try:
        cost = prefill_flops(job.model.config, visual, text, received)
    except UnsupportedModelError:
        return None
    return job.prompts * (cost.prefill + cost.lm_head)


def comparisons(rows: Sequence[Mapping[str, Any]], times: Times, visual_tokens: int, steps: int) -> dict[str, Any]:
    """Compare arms; ratios are medians of the ratios within each turn. What lacks an arm is left out.

    Parameters
    ----------
    steps
        Tokens of each answer behind the first.

    Returns
    -------
    dict
        ``attached_at_ratio_1``
            First token with foveate attached at a budget that covers everything, of the unpruned model's.
        ``probes``
            Vision stage of the method, of the oracle's, which runs the same layers without probes.
        ``vision``
            Vision stage of the method, of the unpruned model's, which runs layers that nobody reads.
        ``first_token_of_oracle``, ``first_token``, ``total``
            First token of the method, of the oracle's and of the unpruned model's, and the whole run.
        ``prefill``
            Share of the prefill time that the method saves (``saved``), the share of the FLOPs that it saves
            (``predicted``), and the first over the second (``reached``).
        ``prefill_beyond_oracle``
            Prefill time of the method less that of the oracle, as a share of the unpruned model's: what a method
            inside the LLM takes to score.
        ``break_even``
            See `break_even`.
        ``naive``
            Vision and selection of the naive way, of the method's, and the peaks of memory in these stages.
    """
    arm = {row["arm"]: row for row in rows}
    found: dict[str, Any] = {}
    compared: dict[str, tuple[str, str, Sequence[str]]] = {
        "attached_at_ratio_1": ("ratio 1", "unpruned", FIRST_TOKEN),
        "probes": ("method", "oracle", ("vision",)),
        "vision": ("method", "unpruned", ("vision",)),
        "first_token_of_oracle": ("method", "oracle", FIRST_TOKEN),
        "first_token": ("method", "unpruned", FIRST_TOKEN),
        "total": ("method", "unpruned", STAGES),
    }
    # What reduces before the LLM inside an attachment does not report where vision ends.
    split = {name for name in arm if all(turn["vision"] > 0 for turn in times[name])}
    for key, (one, other, stages) in compared.items():
        if {one, other} <= (split if stages == ("vision",) else arm.keys()):
            found[key] = round(ratio(times[one], times[other], stages), 4)
    if {"method", "unpruned"} <= split:
        found["prefill"] = _prefill(arm, times)
    if {"method", "unpruned", "oracle"} <= split:
        prefill = ("prefill",)
        beyond = ratio(times["method"], times["unpruned"], prefill) - ratio(times["oracle"], times["unpruned"], prefill)
        found["prefill_beyond_oracle"] = round(beyond, 4)
        found["break_even"] = break_even(times, visual_tokens - arm["method"]["tokens"], visual_tokens, steps)
    if {"method", "naive"} <= split:
        stages = ("vision", "select")
        found["naive"] = {
            "vision_and_select": round(ratio(times["naive"], times["method"], stages), 4),
            "peak_bytes": {name: max(arm[name]["peak_bytes"][s] for s in stages) for name in ("naive", "method")},
        }
    return found


def ratio(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]], stages: Sequence[str]) -> float:
    """Return the median over turns of the time that one arm takes in some stages, over that of the other."""
    return statistics.median(_sum(a, stages) / _sum(b, stages) for a, b in zip(one, other, strict=True))


def _prefill(arm: Mapping[str, Mapping[str, Any]], times: Times) -> dict[str, float]:
    saved = 1 - ratio(times["method"], times["unpruned"], ("prefill",))
    one, whole = (arm[name]["prefill_flops"] for name in ("method", "unpruned"))
    if one is None or one == whole:
        return {"saved": round(saved, 4)}
    predicted = 1 - one / whole
    return {"saved": round(saved, 4), "predicted": round(predicted, 4), "reached": round(saved / predicted, 4)}


def break_even(times: Times, dropped: float, most: int, steps: int) -> dict[str, float | None]:
    """Say from what size on the method pays, taking prefill time as linear in the tokens that are dropped.

    Parameters
    ----------
    times
        Of the arms ``"method"``, ``"unpruned"`` and ``"oracle"``.
    dropped
        Visual tokens that the method drops here.
    most
        Visual tokens that there are.
    steps
        Tokens of the answer behind the first.

    Returns
    -------
    dict
        ``dropped_tokens``
            How many visual tokens must be dropped for the prefill that they save to equal what vision and selection
            take longer than in the unpruned model. 0 if they take no longer; `None` if dropping saves nothing, or if
            more than `most` would have to go.
        ``dropped_tokens_for_deciding``
            The same for what probes, decision and compaction take, which is what the oracle does without.
        ``answer_tokens``
            How long an answer must be for the whole run to take less time. 0 if the first token already comes earlier;
            `None` if decoding is no faster either, or was not measured.
    """
    medians = {
        name: {stage: statistics.median(t[stage] for t in turns) for stage in STAGES} for name, turns in times.items()
    }
    one, whole, free = (medians[name] for name in ("method", "unpruned", "oracle"))
    gain = (whole["prefill"] - one["prefill"]) / dropped if dropped else 0.0
    own, stock, least = (_sum(arm, ("vision", "select")) for arm in (one, whole, free))
    late = _sum(one, FIRST_TOKEN) - _sum(whole, FIRST_TOKEN)
    return {
        "dropped_tokens": _pays(own - stock, gain, most),
        "dropped_tokens_for_deciding": _pays(own - least, gain, most),
        "answer_tokens": _pays(late, (whole["decode"] - one["decode"]) / steps) if steps else None,
    }


def _pays(cost: float, gain: float, most: float = float("inf")) -> float | None:
    """Return how often a gain must come to make up for a cost."""
    if cost <= 0:
        return 0.0
    return round(cost / gain, 1) if gain > 0 and cost / gain <= most else None


def _sum(seconds: Mapping[str, float], stages: Sequence[str]) -> float:
    return sum(seconds[stage] for stage in stages)
