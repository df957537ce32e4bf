"""Checks of what methods keep of the same values: on another device, with other threads, alone and in a batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from foveate.bench.conditioning import changed, flows, noise, permutation, same, twice
from foveate.bench.inputs import random_codebook, random_tokens
from foveate.check.subjects import Subject
from foveate.check.verdicts import WRONG, Minutes, Verdict, judged
from foveate.core.checks import selected, selected_inside
from foveate.core.errors import FoveateError
from foveate.core.in_llm import InLlmReducer, LayerTokens
from foveate.core.probes import Probe
from foveate.core.reducer import Method, Reducer
from foveate.core.tokens import VisualTokens
from foveate.engines.settings import Settings
from foveate.engines.transformers.attach import attach_with
from foveate.measure.timing import threads
from foveate.registry import get_method, list_methods, load_reducer, parameters_without_default

GRID: Final = (24, 24)
FRAMES: Final = 8
SEEDS: Final = 1
THREADS: Final = (1, 2)
T = TypeVar("T", bound=VisualTokens)
Flows = set[tuple[int, int]]


@contextmanager
def all_methods(keep: float) -> Iterator[tuple[list[Method], dict[str, str]]]:
    """Make every method that there is, plugins among them, and say of the others why they cannot be made.

    The file that `codebook` needs is made of random prototypes, and lasts as long as the context.
    """
    with tempfile.TemporaryDirectory() as folder:
        book = Path(folder) / "random.safetensors"
        random_codebook().save(str(book))
        made, lacking = [], {}
        for name in list_methods():
            needed: dict[str, Any] = {"codebook": str(book)} if name == "codebook" else {}
            more = [parameter for parameter in parameters_without_default(name) if parameter not in needed]
            if more:
                lacking[name] = f"needs {', '.join(more)}"
                continue
            try:
                made.append(load_reducer(name, **({"keep": keep} if get_method(name).budgets else {}), **needed))
            except FoveateError as error:
                lacking[name] = str(error)
        yield made, lacking


@dataclass(frozen=True)
class Plan:
    """How much is tried: the grid of the pictures, how many there are, and what is compared with the CPU."""

    device: torch.device
    grid: tuple[int, int] = GRID
    seeds: int = SEEDS

    @property
    def elsewhere(self) -> str:
        """What is compared with the CPU."""
        return str(self.device) if self.device.type == "cuda" else f"{THREADS[1]} threads"


def before_llm(reducers: Sequence[Method], plan: Plan, minutes: Minutes) -> list[Verdict]:
    """Judge each method that decides before the LLM, on random tokens."""
    return [judged(r.name, lambda r=r: _before(r, plan), minutes) for r in reducers]  # type: ignore[misc]


def _before(reducer: Method, plan: Plan) -> Verdict:
    if not isinstance(reducer, Reducer) or reducer.stage != "before_llm":
        return Verdict(reducer.name, "not run", f"stage {reducer.stage}: decides on what the vision tower computes")
    shares: dict[str, list[float]] = {}
    for seed in range(plan.seeds):
        tokens = tokens_for(reducer, plan.grid, seed)

        def of(given: VisualTokens) -> Flows:
            return flows(selected(reducer, given)[0])

        with threads(THREADS[0]):
            found = {
                "rounding": [of(changed(tokens, permutation(seed))), of(changed(tokens, noise(seed)))],
                "batch": [of(twice(tokens))],
            }
            due = of(tokens)
        if plan.device.type == "cuda":
            there = on(tokens, plan.device)
            found |= {"elsewhere": [of(there)], "batch": [*found["batch"], of(twice(there))]}
        else:
            with threads(THREADS[1]):
                found["elsewhere"] = [of(tokens)]
        for key, results in found.items():
            shares.setdefault(key, []).extend(same(due, flow) for flow in results)
    return _judge(reducer.name, shares)


def _judge(name: str, shares: Mapping[str, Sequence[float]]) -> Verdict:
    """Judge by the worst of all pictures: what is the same elsewhere is at least what is the same under rounding."""
    worst = {key: round(min(values), 4) for key, values in shares.items()}
    least = worst["rounding"]
    if all(worst[key] == 1 for key in worst if key != "rounding"):
        return Verdict(name, "right", "the same", {"same": worst})
    said = ", ".join(f"{key} {share:.1%}" for key, share in worst.items())
    if any(worst[key] < least for key in worst):
        return Verdict(name, WRONG, f"the same: {said}", {"same": worst})
    return Verdict(name, "right", f"as far as rounding lets it be the same: {said}", {"same": worst})


def tokens_for(reducer: Method, grid: tuple[int, int], seed: int = 0) -> VisualTokens:
    """Make random tokens on the CPU; methods for video get them cut into frames."""
    if reducer.video_only:
        return random_tokens(reducer.needs, (max(1, grid[0] // FRAMES), grid[1]), 1, FRAMES, seed)
    return random_tokens(reducer.needs, grid, 1, 0, seed)


def on(tokens: T, device: torch.device) -> T:
    """Return tokens with all that a method reads of them on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    return _with_tensors(tokens, moved, device)


def _with_tensors(tokens: T, change: Callable[[Any], Any], device: torch.device) -> T:
    planes: dict[Probe, list[Tensor]] = {probe: [change(x) for x in plane] for probe, plane in tokens.planes.items()}
    names = ["queries"]
    if isinstance(tokens, LayerTokens):
        names += ["origin", "places", "rows", "judging", "text", "text_before", "frequencies"]
    further = {name: change(getattr(tokens, name)) for name in names}
    return replace(tokens, planes=planes, device=device, **further)


def inside_llm(reducers: Sequence[Method], subject: Subject, minutes: Minutes) -> list[Verdict]:
    """Judge each method that decides inside the LLM, on what it reads there of the model's own prompts."""
    return [judged(r.name, lambda r=r: _inside(r, subject), minutes) for r in reducers]  # type: ignore[misc]


def _inside(reducer: Method, subject: Subject) -> Verdict:
    if not isinstance(reducer, InLlmReducer):
        return Verdict(reducer.name, "not run", "several stages, each of which is a method of its own")
    if lacking := subject.family.lacks(reducer):
        return Verdict(reducer.name, "not run", f"needs {lacking}, which the family {subject.family.name!r} lacks")
    job, seen = subject.pair, list[LayerTokens]()
    settings = Settings.make(reducer, family=subject.family)
    with _recorded(reducer, seen), attach_with(job.model, job.family, settings), torch.no_grad():
        job.model.generate(**job.inputs, max_new_tokens=1, do_sample=False, num_beams=1)
    if not seen:
        return Verdict(reducer.name, "not run", "it was not asked in a model of this depth")
    shares: dict[str, list[float]] = {"rounding": [], "elsewhere": []}
    for tokens in seen:
        here = on(tokens, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)

        def rounded(value: Any, generator: torch.Generator = generator) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                factor = 1 + torch.finfo(torch.float32).eps * torch.randn(value.shape, generator=generator)
                return value.float() * factor
            return tuple(map(rounded, value)) if isinstance(value, tuple) else value

        with threads(THREADS[0]):
            due = _all_flows(reducer, here)
            shares["rounding"].append(same(due, _all_flows(reducer, _with_tensors(here, rounded, here.device))))
        with threads(THREADS[1]):
            shares["elsewhere"].append(same(due, _all_flows(reducer, tokens)))
    return _judge(reducer.name, shares)


@contextmanager
def _recorded(reducer: Method, seen: list[LayerTokens]) -> Iterator[None]:
    """Note down what a method is shown at its boundaries."""
    select: Any = reducer.select  # type: ignore[attr-defined]

    def noted(tokens: LayerTokens) -> Any:
        seen.append(tokens)
        return select(tokens)

    object.__setattr__(reducer, "select", noted)  # of this object alone: its class, and other methods, stay
    try:
        yield
    finally:
        object.__delattr__(reducer, "select")


def _all_flows(reducer: InLlmReducer, tokens: LayerTokens) -> set[Any]:
    chosen = selected_inside(reducer, tokens)
    return {(i, *flow) for i, span in enumerate(chosen) for flow in flows(span)}


def summary(check: str, rows: Sequence[Verdict], lacking: Mapping[str, str], plan: Plan) -> Verdict:
    """Return one verdict on many methods, of which each has its own among the figures."""
    wrong, right = ([row for row in rows if row.word == word] for word in (WRONG, "right"))
    skipped = {**{row.check: row.said for row in rows if row.word == "not run"}, **lacking}
    figures = {"methods": [row.to_dict() for row in rows], "left_out": dict(lacking), "compared": plan.elsewhere}
    about = f"{len(right)} methods, the CPU against {plan.elsewhere}" + f"; {len(skipped)} not run" * bool(skipped)
    if wrong:
        return Verdict(check, WRONG, "; ".join(f"{row.check}: {row.said}" for row in wrong), figures)
    return Verdict(check, "right" if right else "not run", about, figures)


@torch.no_grad()
def kept_sets(
    subject: Subject, reducers: Sequence[Method], lacking: Mapping[str, str], plan: Plan, minutes: Minutes
) -> list[Verdict]:
    """Judge what every method keeps, before and inside the LLM; `lacking` says why some cannot be made."""
    late = [r for r in reducers if r.stage == "in_llm"]
    # On the model's own prompts methods decide quickly: they leave more time to the others.
    inside = inside_llm(late, subject, minutes.half())
    before = before_llm([r for r in reducers if r.stage != "in_llm"], plan, minutes.half())
    lacking_late = {name: why for name, why in lacking.items() if get_method(name).stage == "in_llm"}
    lacking_early = {name: why for name, why in lacking.items() if name not in lacking_late}
    return [
        summary("kept sets, before the LLM", before, lacking_early, plan),
        summary("kept sets, inside the LLM", inside, lacking_late, plan),
    ]
