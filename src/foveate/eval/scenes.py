"""Methods on the embedded model and its scenes: what is compared, and the answers, kept on disk as they come."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

import foveate.nano as nano
from foveate.core.errors import FoveateError, InputError
from foveate.core.in_llm import tokens_per_layer
from foveate.core.reducer import Method
from foveate.engines.transformers.attach import attach
from foveate.eval.rows import append, read
from foveate.measure.baselines import BASELINES
from foveate.measure.job import Job
from foveate.measure.provenance import versions
from foveate.measure.run import run_methods
from foveate.methods.chain import Chain
from foveate.nano.evaluate import Asked, ask_all, count_kinds
from foveate.nano.runner import Condition
from foveate.registry import get_method, list_methods, load_reducer

SPLIT: Final = "test"
BUDGETS: Final = (64, 32, 16, 8)
DRAWS: Final = 3
"""Runs of a method that draws, each with a seed of its own."""
BLOCK: Final = 25
"""Images whose answers are written at once."""
Counts: TypeAlias = NDArray[np.int64]
UNPRUNED, BLIND = "unpruned", "blind"


@dataclass(frozen=True)
class Entry:
    """One way to run the model that the leaderboard shows.

    Attributes
    ----------
    method
        A name of a method or the path of a file with one; `UNPRUNED`, or `BLIND`, which sees another scene's image.
    budget
        Visual tokens, or for a method inside the LLM equivalent tokens; `None` for those two.
    reducers
        One, or one per draw.
    rectify, absorb
        See `foveate.engines.settings.Settings`.
    """

    method: str
    budget: int | None = None
    reducers: tuple[Method, ...] = ()
    rectify: float = 0.0
    absorb: bool = False

    @property
    def variant(self) -> str:
        """What sets it apart from the plain method, such as ``"absorb, rectify 1"``; empty for that one."""
        parts = ["absorb"] * self.absorb + [f"rectify {self.rectify:g}"] * (self.rectify > 0)
        return ", ".join(parts)

    def conditions(self) -> list[Condition]:
        """Return what the model is run with, one condition per draw."""
        if not self.reducers:
            return [Condition(self.method, wrong_image=self.method == BLIND)]
        return [
            Condition(
                " ".join(filter(None, [self.method, str(self.budget), self.variant, str(i)])), r,
                None if isinstance(r, Chain) else r.positions, rectify=self.rectify, absorb=self.absorb,
            )
            for i, r in enumerate(self.reducers)
        ]  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """What one condition came to, of the images it was run on.

    Attributes
    ----------
    right
        Right answers per image and kind, int64 ``[images, kinds]``.
    asked
        Questions likewise, of conditions without a method; those of the others are the ones of `UNPRUNED`.
    agreed
        Per image, answers that are those of the unpruned model, int64 ``[images]``; of conditions with a method.
    kept
        Visual tokens that were left, the mean over the images; of conditions with a method.
    commits
        Commits of foveate at which the images were run, sorted; one outside a checkout is empty.
    """

    right: Counts
    asked: Counts
    agreed: Counts
    kept: float | None
    commits: tuple[str, ...]


def entries(
    model: Any, methods: Sequence[str], budgets: Sequence[int], total: int, own: Mapping[str, Entry] | None = None
) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Return what to compare: the given methods, or all if there are none, and always the baselines.

    The baselines run at every budget, those of `own` included.

    Parameters
    ----------
    model
        Decides which methods can run.
    methods
        Names, or JSON files that `Method.save` wrote.
    budgets
        Visual tokens to keep, of files instead of their own budgets.
    total
        Visual tokens of the unpruned prompt.
    own
        Files that run as they are, by `as_they_are`.

    Returns
    -------
    tuple
        The entries; and for each method that cannot run, at some budgets or at all, those ``"budgets"`` and the
        ``"reason"``.

    Raises
    ------
    FoveateError
        If a method that was asked for by name cannot run at any of the budgets, or a budget leaves nothing to reduce.
    """
    own = own or {}
    given = () if methods and own.keys() >= {*methods} else tuple(budgets)  # nothing else to compare with there
    every = tuple(dict.fromkeys([*given, *budgets_of(own.values())]))
    if max(every) >= total:
        raise InputError(f"{max(every)} of {total} visual tokens leave nothing to reduce: keep fewer")
    found, left_out = [Entry(UNPRUNED), Entry(BLIND)], []
    for name in dict.fromkeys([*BASELINES, *(methods or list_methods())]):
        if name in own:
            found.append(own[name])
            continue
        reasons: dict[str, list[int]] = {}
        at = every if name in BASELINES else given
        for budget in at:
            try:
                found.append(_entry(model, name, budget, total))
            except FoveateError as error:
                reasons.setdefault(str(error), []).append(budget)
                if name in methods and sum(map(len, reasons.values())) == len(at):
                    raise
        left_out += [{"method": name, "budgets": lacking, "reason": reason} for reason, lacking in reasons.items()]
    return found, left_out


def _entry(model: Any, name: str, budget: int, total: int) -> Entry:
    depth = model.config.get_text_config().num_hidden_layers
    reducer = equal_tokens(name, budget, total, depth)
    check_runs(model, reducer)
    return Entry(name, budget, draws(reducer))


def check_runs(model: Any, reducer: Method, rectify: float = 0.0, absorb: bool = False) -> None:
    """Raise `FoveateError` if a method cannot run on a model and its scenes."""
    if reducer.video_only:
        raise InputError(f"{reducer.name} leaves images alone")
    if reducer.guided:
        raise InputError(f"{reducer.name} needs a second model to guide this one, see foveate.guide")
    with attach(model, reducer, rectify=rectify, absorb=absorb):
        pass  # raises if the model cannot run the method


def budgets_of(found: Iterable[Entry]) -> list[int]:
    """Return the budgets of entries, each once."""
    return list(dict.fromkeys(entry.budget for entry in found if entry.budget is not None))


def as_they_are(job: Job, methods: Sequence[str]) -> dict[str, Entry]:
    """Return an entry for each file among some methods, with the budget that is in it.

    Parameters
    ----------
    job
        A question about a scene. What a method leaves there, the mean over the layers of the LLM and rounded, is the
        budget of its entry, at which it is compared.

    Raises
    ------
    FoveateError
        If a file holds no method, or the model cannot run it.
    """
    found = {}
    for name in dict.fromkeys(filter(_is_file, methods)):
        reducer = load_reducer(name)
        check_runs(job.model, reducer)
        (outcome,) = run_methods(job, [reducer], repeats=0)
        found[name] = Entry(name, round(outcome.equivalent), draws(reducer))
    return found


def _is_file(name: str) -> bool:
    return name.endswith(".json")


def draws(reducer: Method) -> tuple[Method, ...]:
    """Return a method as often as it is run: one that draws once for each of `DRAWS` seeds."""
    if "seed" not in {field.name for field in fields(reducer)}:
        return (reducer,)
    return tuple(load_reducer(reducer, seed=seed) for seed in range(DRAWS))


def equal_tokens(name: str, budget: int, total: int, depth: int) -> Method:
    """Return a method with its defaults and `budget` equivalent tokens, the mean over the layers of the LLM.

    A method before the LLM keeps just that many. One inside the LLM shows its first layers more, and so keeps fewer
    later.

    Raises
    ------
    FoveateError
        If its first layers alone see more, it is a chain, or `name` is neither a method nor a file with one.
    """
    method = type(load_reducer(name)) if _is_file(name) else get_method(name)
    if method is Chain and _is_file(name):
        raise InputError(
            f"the parts of the chain {name} have budgets of their own: leave out --keep to run it as it is"
        )
    solves = "equivalent" in {field.name for field in fields(method)}
    reducer = load_reducer(name, keep=None, equivalent=budget) if solves else load_reducer(name, keep=budget)
    if method.stage == "in_llm":
        tokens_per_layer(reducer, depth, total)  # raises if the budget is out of reach
    return reducer


def blocks(images: int) -> range:
    """Return the first image of each block.

    Raises
    ------
    InputError
        If the images do not fill their blocks.
    """
    if images % BLOCK:
        raise InputError(f"the images are run in blocks of {BLOCK}: ask for a multiple of it, not {images}")
    return range(0, images, BLOCK)


def collect(
    found: Sequence[Entry],
    images: int,
    seed: int,
    rows: Path,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Answers]:
    """Run all conditions on test scenes, but for what the file `rows` holds already; add the answers to it.

    Parameters
    ----------
    found
        What to compare.
    images, seed
        Which scenes of the test split; `images` is a multiple of `BLOCK`.
    rows
        One line of JSON per condition and block of images. To measure a method again, delete its lines.
    processes
        Single-threaded processes that share the blocks.
    progress
        Called with the number of conditions times images that are done, and of how many; after each image, or with
        several processes after each block.

    Returns
    -------
    dict of Answers
        By the name of the condition.
    """
    starts = blocks(images)
    keys = {c.name: _key(c, seed, weights_digest()) for entry in found for c in entry.conditions()}
    conditions = {keys[c.name]: c for entry in found for c in entry.conditions()}  # each once, whatever it is called
    done = read(rows)
    jobs = []
    for start in starts:
        pending = [c for key, c in conditions.items() if (key, start) not in done]
        if pending:
            jobs.append((start, pending))
    total = images * len(conditions)
    ready = total - BLOCK * sum(len(pending) for _, pending in jobs)
    progress(ready, total)

    def advance(answers: int) -> None:
        nonlocal ready
        ready += answers
        progress(ready, total)

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) if processes > 1 else nullcontext() as pool:
        if pool is None:
            results: Iterable[list[dict[str, Any]]] = (_block(job, seed, advance) for job in jobs)
        else:
            results = pool.map(functools.partial(_block, seed=seed), jobs)
        for (start, pending), lines in zip(jobs, results, strict=True):
            append(rows, lines)
            done |= {(line["key"], start): line for line in lines}
            if pool is not None:
                advance(BLOCK * len(pending))
    return {name: _joined([done[key, start] for start in starts]) for name, key in keys.items()}


@functools.cache
def weights_digest() -> str:
    """Return the start of the SHA-256 of nano's weights."""
    return hashlib.sha256((nano.WEIGHTS / "model.safetensors").read_bytes()).hexdigest()[:12]


def _key(condition: Condition, seed: int, weights: str) -> str:
    what = condition.name if condition.reducer is None else condition.reducer.to_dict()
    key: list[Any] = [what, condition.positions, SPLIT, seed, weights]
    if condition.rectify or condition.absorb:
        key.append({"rectify": condition.rectify, "absorb": condition.absorb})
    return json.dumps(key, sort_keys=True)


def _block(
    job: tuple[int, list[Condition]], seed: int, advance: Callable[[int], None] = lambda answers: None
) -> list[dict[str, Any]]:
    """Run conditions on one block of scenes; returns a line of the file for each."""
    torch.set_num_threads(1)
    start, pending = job
    model, processor = _loaded()
    reference = Condition(UNPRUNED)
    conditions = pending if any(c.name == UNPRUNED for c in pending) else [reference, *pending]
    scenes = (nano.scene(SPLIT, seed, index) for index in range(start, start + BLOCK))
    parts: dict[str, list[Asked | None]] = defaultdict(list)
    for answered in ask_all(model, processor, scenes, conditions):
        for name in {UNPRUNED, *(condition.name for condition in pending)}:
            parts[name].append(answered.get(name))  # before the first scene there is no other image
        advance(len(pending))
    commit, weights = versions()["commit"][:12], weights_digest()
    return [
        {"key": _key(c, seed, weights), "start": start, "commit": commit, **_line(c, parts[c.name], parts[UNPRUNED])}
        for c in pending
    ]


def _line(condition: Condition, answered: Sequence[Asked | None], unpruned: Sequence[Asked | None]) -> dict[str, Any]:
    """Return counts per image: those by kind of question as a string with a digit for each kind."""
    line: dict[str, Any] = {"right": [_digits(one, one.right() if one else ()) for one in answered]}
    if condition.reducer is None:
        line["asked"] = [_digits(one, [True] * len(one.questions) if one else ()) for one in answered]
    else:
        line["agreed"] = [
            sum(map(str.__eq__, one.answers, other.answers)) if one and other else 0
            for one, other in zip(answered, unpruned, strict=True)
        ]
        line["kept"] = round(float(np.mean([one.kept for one in answered if one])), 3)
    return line


def _digits(asked: Asked | None, flags: Sequence[bool]) -> str:
    return "".join(map(str, count_kinds(asked.questions if asked else (), flags)))


@functools.cache
def _loaded() -> tuple[Any, Any]:
    return nano.load()


def _joined(lines: Sequence[Mapping[str, Any]]) -> Answers:
    def rows(field: str) -> Any:
        return [image for line in lines for image in line.get(field, ())]

    def table(field: str) -> Counts:
        return np.array([[int(digit) for digit in image] for image in rows(field)], np.int64)

    kept = [line["kept"] for line in lines if "kept" in line]
    return Answers(
        table("right"), table("asked"), np.array(rows("agreed"), np.int64), sum(kept) / len(kept) if kept else None,
        tuple(sorted({line["commit"] for line in lines})),
    )  # fmt: skip
