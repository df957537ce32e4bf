"""What nano must reach before its weights are shipped, measured on test scenes and written to one file."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from foveate.measure.provenance import versions
from foveate.methods.random import Random
from foveate.methods.vispruner import VisPruner
from foveate.nano import WEIGHTS, scenes
from foveate.nano.evaluate import (
    Tally,
    difference,
    evaluate,
    pooled,
    question_prior,
    seconds_per_question,
)
from foveate.nano.questions import ASKED_KINDS, WITHHELD
from foveate.nano.runner import Condition
from foveate.nano.scenes import scene
from training.nano.recipe import Recipe

DRAWS: Final = 3
CHUNK: Final = 50
CONDITIONS: Final = (
    Condition("full"),
    Condition("wrong_image", wrong_image=True),
    *(Condition(f"random_64_{draw}", Random(keep=64, seed=draw)) for draw in range(DRAWS)),
    *(Condition(f"random_32_{draw}", Random(keep=32, seed=draw)) for draw in range(DRAWS)),
    Condition("random_64_0_compact", Random(keep=64, seed=0), "compact"),
    *(Condition(f"vispruner_{keep}", VisPruner(keep=keep)) for keep in (64, 32)),
    *(Condition(f"vispruner_{keep}_compact", VisPruner(keep=keep), "compact") for keep in (64, 32)),
)


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def _chunk(
    start: int, folder: Path, split: str, seed: int, stop: int, conditions: Sequence[Condition]
) -> dict[str, Tally]:
    torch.set_num_threads(1)
    model, processor = _load(folder)
    chosen = (scene(split, seed, index) for index in range(start, min(start + CHUNK, stop)))
    return evaluate(model, processor, chosen, conditions)


def tallies(
    folder: Path,
    split: str,
    seed: int,
    images: int,
    processes: int,
    conditions: Sequence[Condition] = CONDITIONS,
) -> dict[str, Tally]:
    """Answers under all conditions, with the scenes shared out over processes.

    Parameters
    ----------
    folder : Path
        Model folder.
    split, seed, images
        Which scenes.
    processes : int
        Single-threaded processes.
    conditions : sequence of Condition
        How to run the model.

    Returns
    -------
    dict of Tally
        By condition name.
    """
    work = partial(_chunk, folder=folder, split=split, seed=seed, stop=images, conditions=conditions)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        parts = list(pool.map(work, range(0, images, CHUNK)))
    return {
        name: Tally(np.concatenate([p[name].right for p in parts]), np.concatenate([p[name].asked for p in parts]))
        for name in parts[0]
    }


def _gate(value: float, limit: float, at_least: bool = True) -> dict[str, Any]:
    return {
        "value": round(value, 2),
        "limit": limit,
        "rule": "at least" if at_least else "at most",
        "passed": value >= limit if at_least else value <= limit,
    }


def judge(found: dict[str, Tally], prior: Tally, median_seconds: float) -> dict[str, dict[str, Any]]:
    """Hold the measured conditions against every gate.

    Parameters
    ----------
    found : dict of Tally
        By condition name, with ``random_64`` and ``random_32`` pooled over draws.
    prior : Tally
        Question-only blind level.
    median_seconds : float
        Per question on one core.

    Returns
    -------
    dict
        Value in percent or points, limit, rule and verdict of each gate.
    """
    score = {name: tally.share()["accuracy"] for name, tally in found.items()}
    gates = {
        "all kinds": _gate(score["full"], 92.0),
        "blind, wrong image": _gate(score["wrong_image"], 36.0, at_least=False),
        "blind, question prior": _gate(prior.share()["accuracy"], 36.0, at_least=False),
        "cost of 25 % random tokens": _gate(score["full"] - score["random_64"], 8.0),
        "vispruner above random at 1/8": _gate(score["vispruner_32"] - score["random_32"], 8.0),
    }
    for name in ("random_64_0", "vispruner_64", "vispruner_32"):
        gap = abs(difference(found[f"{name}_compact"], found[name])["points"])
        gates[f"compact against original positions, {name}"] = _gate(gap, 1.0, at_least=False)
    for kind in ASKED_KINDS:
        seen = found["full"].share(kind)["accuracy"]
        blind = max(found["wrong_image"].share(kind)["accuracy"], prior.share(kind)["accuracy"])
        gates[f"{kind}"] = _gate(seen, 75.0)
        gates[f"{kind} above blind"] = _gate(seen - blind, 30.0)
    gates["seconds per question"] = _gate(median_seconds, 0.2, at_least=False)
    return gates


def measure(
    folder: Path = WEIGHTS,
    split: str = "test",
    seed: int = 0,
    images: int = 1000,
    processes: int = 2,
    log: Path | None = None,
) -> dict[str, Any]:
    """Run every condition on one split and judge the gates.

    Parameters
    ----------
    folder : Path
        Model folder.
    split, seed, images
        Which scenes.
    processes : int
        Single-threaded processes.
    log : Path, optional
        ``log.jsonl`` of the training run, whose validation curve is included.

    Returns
    -------
    dict
        Plain values: configuration, versions, scores with clustered errors, differences, gates, timing, curve.
    """
    found = tallies(folder, split, seed, images, processes)
    for keep in (64, 32):
        found[f"random_{keep}"] = pooled([found[f"random_{keep}_{draw}"] for draw in range(DRAWS)])
    prior = question_prior(scenes(seed, images, split))
    speed = seconds_per_question(*_load(folder), scenes(1, 60, "validation"))
    return {
        "config": {
            "split": split,
            "seed": seed,
            "images": images,
            "draws": DRAWS,
            "withheld": list(WITHHELD),
            "dtype": "float32",
            "device": "cpu",
        },
        "conditions": {c.name: {"reducer": repr(c.reducer), "positions": c.positions} for c in CONDITIONS},
        "versions": versions(),
        "accuracy": {name: tally.summary() for name, tally in found.items()} | {"question_prior": prior.summary()},
        "differences": _differences(found),
        "gates": judge(found, prior, speed["median"]),
        "timing": speed,
        "recipe": _recipe(log).to_dict(),
        "curve": list(_curve(log)) if log else [],
    }


def _recipe(log: Path | None) -> Recipe:
    """Return the recipe of the run that wrote a log, which lies beside it, or the shipped one."""
    own = log.with_name("recipe.json") if log else None
    return Recipe.load(own) if own and own.exists() else Recipe.load()


def _differences(found: dict[str, Tally]) -> dict[str, dict[str, float]]:
    pairs = [(f"{name}_compact", name) for name in ("random_64_0", "vispruner_64", "vispruner_32")]
    # Draws are pooled by averaging: the same questions, a third of the count.
    return {f"{one} - {other}": difference(found[one], found[other]) for one, other in pairs} | {
        f"vispruner_{keep} - random_{keep}": difference(_tripled(found[f"vispruner_{keep}"]), found[f"random_{keep}"])
        for keep in (64, 32)
    }


def _tripled(tally: Tally) -> Tally:
    return Tally(DRAWS * tally.right, DRAWS * tally.asked)


def _curve(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if "all" in entry or "kind" in entry:
            yield {name: round(v, 4) if isinstance(v, float) else v for name, v in entry.items()}


def failed(gates: dict[str, dict[str, Any]]) -> Sequence[str]:
    """Names of the gates that were missed."""
    return [name for name, gate in gates.items() if not gate["passed"]]
