"""The leaderboard in brief, as the README and the page on Gaze show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from foveate.eval.leaderboard import load
from foveate.measure.pages import fill, markdown_table

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


def _percent(share: dict[str, float]) -> str:
    return f"{share['accuracy']:.1f} ± {share['error']:.1f}"


def write_table(result: Path, page: Path) -> None:
    """Put the table of a leaderboard's file for which a page has marker lines between these."""
    loaded = load(result)
    gaze = f"<!-- {GAZE_MARKER} -->" in page.read_text(encoding="utf-8")
    fill(page, {GAZE_MARKER: gaze_table(loaded)} if gaze else {MARKER: table(loaded)})
