"""The leaderboard in brief, as the README shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from foveate.eval.leaderboard import load
from foveate.measure.pages import fill, markdown_table

METHODS: Final = ("vispruner", "fastervlm", "random", "uniform", "pool", "downsample")
MARKER: Final = "nano-table"


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


def _percent(share: dict[str, float]) -> str:
    return f"{share['accuracy']:.1f} ± {share['error']:.1f}"


def write_table(result: Path, page: Path) -> None:
    """Put the table of a leaderboard's file between its marker lines in a page."""
    fill(page, {MARKER: table(load(result))})
