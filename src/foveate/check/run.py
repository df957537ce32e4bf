"""All checks of a model on a machine, in their order and within the minutes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from foveate.check import answers, kept, speed, waiting
from foveate.check.kept import all_methods
from foveate.check.subjects import KEEP, Subject
from foveate.check.verdicts import Minutes, Verdict, judged
from foveate.core.errors import InputError
from foveate.core.reducer import Method
from foveate.measure.job import Say
from foveate.measure.provenance import machine, versions


@dataclass(frozen=True)
class Sizes:
    """How much is tried where random tokens stand for those of a model, and how many prompts run at once."""

    grid: tuple[int, int] = kept.GRID
    seeds: int = kept.SEEDS
    grids: tuple[tuple[int, int], ...] = speed.GRIDS
    batches: tuple[int, ...] = speed.BATCHES


def device_of(name: str | None) -> str:
    """Return the device to check on, by default a GPU if there is one.

    Raises
    ------
    InputError
        If it is none, or not there.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"a device is 'cpu', 'cuda' or 'cuda:1', not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"PyTorch finds no CUDA device {name!r}: pass --device cpu, or install a PyTorch for CUDA")
    return name


def check(subject: Subject, minutes: Minutes, sizes: Sizes = Sizes(), say: Say = lambda _: None) -> dict[str, Any]:
    """Run all checks.

    Returns
    -------
    dict
        Configuration, versions, machine, and the verdicts in the order in which they were reached.
    """
    found: list[Verdict] = []

    def judge(name: str, look: Callable[[], Verdict]) -> None:
        say(name)
        found.append(judged(name, look, minutes))

    _check_answers(subject, judge)
    with all_methods(KEEP) as (reducers, lacking):
        say("kept sets")
        plan = kept.Plan(subject.device, sizes.grid, sizes.seeds)
        found += kept.kept_sets(subject, reducers, lacking, plan, minutes)
        say("host waits")
        found += _waits(subject, reducers, sizes, minutes.half())
        judge("selection time", lambda: speed.selection(reducers, subject.device, sizes.grids, minutes))
    pace: dict[int, float] = {}
    for inside in (False, True):
        for batch in sizes.batches:
            where = "inside" if inside else "before"
            look = partial(speed.whole_model, subject, inside, batch, pace, minutes, say)
            judge(f"speed, {where} the LLM, batch {batch}", look)
    return {
        "model": subject.name,
        "config": {
            "class": type(subject.model).__name__, "family": subject.family.name, "device": str(subject.device),
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "attention": subject.model.get_decoder().config._attn_implementation,
            "layers": subject.jobs[0].depth, "minutes": minutes.minutes, "seconds": round(minutes.spent, 1),
            "prompts": [{"visual_tokens": j.visual_tokens, "text_tokens": j.text_tokens} for j in subject.jobs],
        },
        "versions": {**versions(), "cuda": torch.version.cuda},
        "machine": {**machine(), **hardware(subject.device)},
        "verdicts": [verdict.to_dict() for verdict in found],
    }  # fmt: skip


def _check_answers(subject: Subject, judge: Callable[[str, Callable[[], Verdict]], None]) -> None:
    for check, look in (("keep all", answers.unchanged), ("pruned as hidden", answers.as_hidden)):
        judge(f"{check}, before the LLM", lambda look=look: look(subject, subject.before()))  # type: ignore[misc]
        judge(f"{check}, inside the LLM", lambda look=look: look(subject, subject.inside()))  # type: ignore[misc]
    for inside in (False, True):
        judge(
            f"alone as in a batch, {'inside' if inside else 'before'} the LLM",
            lambda inside=inside: answers.alone_as_in_batch(subject, answers.by_place(subject, inside)),  # type: ignore[misc]
        )


def _waits(subject: Subject, reducers: Sequence[Method], sizes: Sizes, minutes: Minutes) -> list[Verdict]:
    checks = ("host waits, selection", "host waits, decoding, before the LLM", "host waits, decoding, inside the LLM")
    if subject.device.type != "cuda":
        return [Verdict(check, "not run", waiting.NOT_APPLICABLE) for check in checks]
    selections = waiting.in_selection(reducers, subject.device, sizes.grid, minutes)
    return [
        waiting.summary(selections),
        judged(checks[1], lambda: waiting.while_decoding(subject, subject.before()), minutes),
        judged(checks[2], lambda: waiting.while_decoding(subject, subject.inside()), minutes),
    ]


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what a machine has: processor cores, and of a GPU its name, memory and compute capability."""
    found: dict[str, Any] = {"cores": os.cpu_count()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "device": about.name, "memory_bytes": about.total_memory, "capability": f"{about.major}.{about.minor}",
        }  # fmt: skip
    else:
        found["device"] = "cpu"
    return found
