"""The leaderboard in brief, as the README and the pages on Gaze and on rectifying show it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

from foveate.eval.leaderboard import load, variant_cell
from foveate.measure.baselines import BASELINES
from foveate.measure.pages import fill, markdown_table
from foveate.nano.questions import ASKED_KINDS

METHODS: Final = ("gaze_query", "gaze", "cdpruner", "vispruner", "fastervlm", "random", "uniform", "pool", "downsample")
MARKER: Final = "nano-table"
BESIDE_GAZE: Final = (
    "gaze_query",
    "gaze",
    "cdpruner",
    "mmtok",
    "todre",
    "mmr",
    "divprune",
    "scope",
    "vispruner",
    "random",
)
GAZE_MARKER: Final = "gaze-table"
RECTIFY_MARKER, KINDS_MARKER = "rectify-table", "rectify-kinds"


def table(result: dict[str, Any]) -> str:
    """Return the accuracy of a few methods at every budget of a leaderboard, in Markdown.

    Raises
    ------
    LookupError
        If the leaderboard lacks one of them.
    """
    config, whole = result["config"], result["unpruned"]["all"]
    found = {(row["method"], row["budget"]): row["accuracy"] for row in result["rows"]}
    rows = [[f"`{name}`", *(_percent(found[name, budget]) for budget in config["budgets"])] for name in METHODS]
    return (
        f"{markdown_table(['method', *(f'{budget} tokens' for budget in config['budgets'])], rows)}\n\n"
        f"All {config['visual_tokens']} tokens: {_percent(whole)}. {config['questions']:,} questions on "
        f"{config['images']:,} test images; `random` is the mean of {config['draws']} draws."
    )


def gaze_table(result: dict[str, Any]) -> str:
    """Return the relative average of Gaze and of methods beside it, and how far these are from the best, in Markdown.

    Raises
    ------
    LookupError
        If the leaderboard lacks one of them.
    """
    budgets = result["config"]["budgets"]
    found = {(row["method"], row["budget"]): row for row in result["rows"]}
    head = ["method", *(text for budget in budgets for text in (f"{budget} tokens", "to the best"))]
    rows = [
        [f"`{name}`", *(text for budget in budgets for text in _beside(found[name, budget]))] for name in BESIDE_GAZE
    ]
    return markdown_table(head, rows)


def _beside(row: dict[str, Any]) -> tuple[str, str]:
    relative, gap = row["relative"], row["against"].get("best")
    points = f"{gap['points']:+.1f} ± {gap['error']:.1f}" if gap else ""
    return f"{relative['average']:.1f} ± {relative['error']:.1f}", points


def rectify_tables(result: dict[str, Any]) -> dict[str, str]:
    """Return what the variants of a leaderboard gain, by method and by kind of question, in Markdown."""
    budgets, variants = result["config"]["budgets"], result["config"]["variants"]
    rows = {(row["method"], row["budget"]): row for row in result["rows"]}
    names = list(dict.fromkeys(name for name, budget in rows if budget == budgets[-1]))
    head = ["method", *(text for budget in budgets for text in (f"{budget} tokens", *variants))]
    lines = [
        [f"`{name}`", *(text for budget in budgets for text in _with_variants(rows[name, budget], variants))]
        for name in names
    ]
    own = [name for name in names if name not in BASELINES]
    shown = []
    for kind in ASKED_KINDS:
        gains = []
        for variant in variants:
            for budget in budgets:
                of = [rows[name, budget] for name in own if variant in rows[name, budget].get("variants", {})]
                gains.append(
                    mean(r["variants"][variant]["kinds"][kind]["relative"] - r["kinds"][kind]["relative"] for r in of)
                )
        shown.append([kind, *(f"{gain:+.1f}" for gain in gains)])
    columns = ["kind", *(f"{variant}: {budget} tokens" for variant in variants for budget in budgets)]
    return {RECTIFY_MARKER: markdown_table(head, lines), KINDS_MARKER: markdown_table(columns, shown)}


def _with_variants(row: dict[str, Any], variants: Sequence[str]) -> list[str]:
    return [f"{row['relative']['average']:.1f}", *(variant_cell(row, variant) for variant in variants)]


def _percent(share: dict[str, float]) -> str:
    return f"{share['accuracy']:.1f} ± {share['error']:.1f}"


def write_table(result: Path, page: Path) -> None:
    """Put the table of a leaderboard's file for which a page has marker lines between these."""
    loaded = load(result)
    shown = page.read_text(encoding="utf-8")
    if f"<!-- {RECTIFY_MARKER} -->" in shown:
        fill(page, rectify_tables(loaded))
    elif f"<!-- {GAZE_MARKER} -->" in shown:
        fill(page, {GAZE_MARKER: gaze_table(loaded)})
    else:
        fill(page, {MARKER: table(loaded)})
