"""The model card's tables, from the files that `foveate nano eval` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from foveate.core.reducer import Method
from foveate.measure.pages import fill, markdown_table
from foveate.methods import Random, VisPruner
from foveate.nano.questions import ASKED_KINDS
from training.nano.acceptance import DRAWS

Result = dict[str, Any]

SHOWN: Final[tuple[tuple[str, str | Method], ...]] = (
    ("full", "all 256 tokens"),
    ("vispruner_64", VisPruner(keep=64)),
    ("vispruner_32", VisPruner(keep=32)),
    ("random_64", Random(keep=64)),
    ("random_32", Random(keep=32)),
    ("wrong_image", "blind: another scene's image"),
    ("question_prior", "blind: question prior"),
)


def write_card(results: Sequence[Path], page: Path) -> None:
    """Put all tables between their markers in a Markdown page.

    Parameters
    ----------
    results
        Files of `foveate nano eval`: that of the shipped weights, then those of other training seeds.
    page
        Has a pair of lines ``<!-- nano-NAME -->`` and ``<!-- /nano-NAME -->`` for each table.

    Raises
    ------
    FoveateError
        If the page has no place for one of the tables.
    """
    shown = tables([json.loads(path.read_text(encoding="utf-8")) for path in results])
    fill(page, {f"nano-{name}": table for name, table in shown.items()})


def tables(results: Sequence[Result]) -> dict[str, str]:
    """Return the Markdown of each table, by name."""
    shipped = results[0]
    return {
        "accuracy": _accuracy(shipped),
        "pairs": _pairs(shipped),
        "gates": _gates(shipped),
        "seeds": _seeds(results),
        "tower": _curve(shipped, "tower", ("kind", "color", "region", "digit", "center_f1")),
        "decoder": _curve(shipped, "decoder", ("all", *ASKED_KINDS)),
    }


def _accuracy(result: Result) -> str:
    rows = []
    for name, shown in SHOWN:
        found = result["accuracy"][name]
        label = shown if isinstance(shown, str) else f"`{type(shown).__name__}(keep={shown.keep})`"
        label += f", mean of {DRAWS}" if isinstance(shown, Random) else ""
        every = f"{found['all']['accuracy']:.1f} ± {found['all']['error']:.1f}"
        rows.append([label, every, *(f"{found[kind]['accuracy']:.1f}" for kind in ASKED_KINDS)])
    images, questions = result["config"]["images"], result["accuracy"]["full"]["all"]["questions"]
    about = f"{images:,} test scenes (seed {result['config']['seed']}), {questions:,} questions."
    return markdown_table(["", "all", *ASKED_KINDS], rows) + "\n\n" + about


def _pairs(result: Result) -> str:
    return markdown_table(
        ["pair", "points"],
        [
            [name.replace("_", " "), f"{pair['points']:+.2f} ± {pair['error']:.2f}"]
            for name, pair in result["differences"].items()
        ],
    )


def _gates(result: Result) -> str:
    return markdown_table(
        ["gate", "value", "must be", "reached"],
        [
            [name.replace("_", " "), f"{gate['value']}", f"{gate['rule']} {gate['limit']:g}", _verdict(gate)]
            for name, gate in result["gates"].items()
        ],
    )


def _verdict(gate: dict[str, Any]) -> str:
    return "yes" if gate["passed"] else "**no**"


def _seeds(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        score = {name: result["accuracy"][name]["all"]["accuracy"] for name, _ in SHOWN}
        kinds = {kind: result["accuracy"]["full"][kind]["accuracy"] for kind in ASKED_KINDS}
        weakest = min(kinds, key=lambda kind: kinds[kind])
        missed = [name for name, gate in result["gates"].items() if not gate["passed"]]
        rows.append([
            str(result["recipe"]["seed"]), *(f"{score[name]:.1f}" for name in ("full", "vispruner_64", "vispruner_32",
            "random_64", "random_32")), f"{weakest} {kinds[weakest]:.1f}", ", ".join(missed) or "none",
        ])  # fmt: skip
    header = [
        "seed",
        "all tokens",
        "VisPruner 64",
        "VisPruner 32",
        "random 64",
        "random 32",
        "weakest kind",
        "gates missed",
    ]
    return markdown_table(header, rows)


def _curve(result: Result, stage: str, columns: Sequence[str]) -> str:
    entries = [entry for entry in result["curve"] if entry["stage"] == stage]
    return markdown_table(
        ["step", *(column.replace("center_f1", "centre") for column in columns)],
        [[str(entry["step"]), *(f"{100 * entry[column]:.1f}" for column in columns)] for entry in entries],
    )
