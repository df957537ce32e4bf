"""Accuracy against cost of a leaderboard, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from foveate.errors import InputError
from foveate.run import BASELINES

INK, GRAY, PALE, ACCENT = "#222222", "#777777", "#c9ced6", "#5e35b1"
ALWAYS: Final = "vispruner"
FRONT: Final = ("#00796b", "#c2410c", "#1565c0", "#ad1457", "#827717", "#4e342e")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the relative average of each method against its FLOPs, with a point for each budget.

    Coloured are VisPruner and the methods that are best at some budget; dashed are the baselines, grey all others.

    Parameters
    ----------
    result
        A leaderboard.
    path
        PNG or SVG, by its ending.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        lines.setdefault(row["method"], []).append(row)
    leaders = []
    for budget in result["config"]["budgets"]:
        rows = [row for row in result["rows"] if row["budget"] == budget]
        leaders.append(max(rows, key=lambda row: row["relative"]["average"])["method"])
    colors = dict(zip((name for name in dict.fromkeys(leaders) if name != ALWAYS), FRONT, strict=False))
    colors[ALWAYS] = ACCENT
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot()
    for name, rows in sorted(lines.items(), key=lambda item: item[0] in colors):
        points = sorted((100 * row["cost"]["of_unpruned"], row["relative"]["average"]) for row in rows)
        style: dict[str, Any] = {"color": PALE, "linewidth": 1, "markersize": 3, "zorder": 1}
        if name in BASELINES:
            style = {"color": GRAY, "linewidth": 1.2, "markersize": 4, "linestyle": "--", "zorder": 2}
        if name in colors:
            style = {"color": colors[name], "linewidth": 2, "markersize": 5, "zorder": 3}
        axes.plot(*zip(*points, strict=True), marker="o", **style)
        if name in BASELINES or name in colors:
            x, y = points[0]
            axes.annotate(
                name, (x, y), xytext=(-6, 0), textcoords="offset points", ha="right", va="center",
                color=style["color"], fontsize=9, fontweight="bold" if name in colors else "normal",
            )  # fmt: skip
    axes.axhline(100, color=INK, linewidth=0.8, linestyle=":")
    axes.annotate("all tokens", (1, 100), xycoords=("axes fraction", "data"), xytext=(-4, 4),
                  textcoords="offset points", ha="right", color=INK, fontsize=9)  # fmt: skip
    axes.set_xlabel("FLOPs of a prompt, vision tower included, in % of the unpruned model")
    axes.set_ylabel("relative average, %")
    axes.margins(x=0.18)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(path)!r}: {error}") from error
