"""Methods side by side on nano: one file of results, and the table that the documentation shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from foveate.core.reducer import Method
from foveate.measure.pages import fill
from foveate.measure.provenance import versions
from foveate.methods import Downsample, FasterVLM, Pool, Random, Uniform, VisPruner
from foveate.nano import WEIGHTS
from foveate.nano.evaluate import Tally, difference, pooled
from foveate.nano.gates import DRAWS, tallies
from foveate.nano.runner import Condition

BUDGETS: Final = (128, 64, 32, 16)
REFERENCE: Final = "vispruner"
MARKER = "nano-table"


def methods(keep: int) -> dict[str, Sequence[Method]]:
    """Return the compared methods at one budget, by the name that the table shows; several stand for draws."""
    return {
        REFERENCE: [VisPruner(keep=keep)],
        "vispruner, order='rank'": [VisPruner(keep=keep, order="rank")],
        "fastervlm": [FasterVLM(keep=keep)],
        "random": [Random(keep=keep, seed=draw) for draw in range(DRAWS)],
        "uniform": [Uniform(keep=keep)],
        "pool": [Pool(keep=keep)],
        "downsample": [Downsample(keep=keep)],
    }


def compare(images: int = 1000, seed: int = 0, processes: int = 2, folder: Path = WEIGHTS) -> dict[str, Any]:
    """Run every method at every budget on test scenes.

    Parameters
    ----------
    images, seed
        Which test scenes.
    processes
        Single-threaded processes that share the scenes.
    folder
        The model folder.

    Returns
    -------
    dict
        Accuracy in percent per method, budget and kind of question, and each method's paired difference to VisPruner.
    """
    runs = {
        (name, keep): [Condition(f"{name} {keep} {i}", r, "compact") for i, r in enumerate(reducers)]
        for keep in BUDGETS
        for name, reducers in methods(keep).items()
    }
    conditions = [Condition("full"), *(c for cs in runs.values() for c in cs)]
    found = tallies(folder, "test", seed, images, processes, conditions)
    joined = {key: pooled([found[c.name] for c in cs]) for key, cs in runs.items()}
    return {
        "config": {
            "split": "test", "seed": seed, "images": images, "draws": DRAWS, "dtype": "float32", "device": "cpu",
            "attention": "sdpa", "positions": "compact",
        },
        "reducers": {f"{name} {keep}": [repr(c.reducer) for c in cs] for (name, keep), cs in runs.items()},
        "versions": versions(),
        "full": found["full"].summary(),
        "methods": {name: {str(keep): joined[name, keep].summary() for keep in BUDGETS} for name in methods(1)},
        "above_vispruner": {
            name: {str(keep): _above(joined[name, keep], joined[REFERENCE, keep]) for keep in BUDGETS}
            for name in methods(1)
            if name != REFERENCE
        },
    }  # fmt: skip


def _above(one: Tally, reference: Tally) -> dict[str, float]:
    """Return the paired difference in points; the reference is repeated for as many draws as `one` pools."""
    draws = int(one.asked.sum()) // int(reference.asked.sum())
    return difference(one, Tally(draws * reference.right, draws * reference.asked))


def table(result: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    config, full = result["config"], result["full"]["all"]
    lines = [
        "| method | " + " | ".join(f"{keep} tokens" for keep in BUDGETS) + " |",
        "|---|" + "---|" * len(BUDGETS),
    ]
    for name, budgets in result["methods"].items():
        cells = (budgets[str(keep)]["all"] for keep in BUDGETS)
        lines.append(f"| `{name}` | " + " | ".join(f"{c['accuracy']:.1f} ± {c['error']:.1f}" for c in cells) + " |")
    lines.append("")
    lines.append(
        f"All 256 tokens: {full['accuracy']:.1f} ± {full['error']:.1f}. {full['questions']:,} questions on "
        f"{config['images']:,} test images; `random` is the mean of {config['draws']} draws."
    )
    return "\n".join(lines)


def write_table(result_file: Path, page: Path) -> None:
    """Put the table between its markers in a Markdown page.

    Raises
    ------
    FoveateError
        If the page has no markers.
    """
    fill(page, {MARKER: table(json.loads(result_file.read_text(encoding="utf-8")))})
