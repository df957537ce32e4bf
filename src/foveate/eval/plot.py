"""Accuracy against cost of a leaderboard, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.figure import Figure

from foveate.core.errors import InputError
from foveate.measure.baselines import BASELINES

INK, GRAY, PALE, ACCENT = "#222222", "#777777", "#c9ced6", "#5e35b1"
ALWAYS: Final = "vispruner"
FRONT: Final = ("#00796b", "#c2410c", "#1565c0", "#ad1457", "#827717", "#4e342e")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the relative average of each method against its FLOPs, with a point for each budget.

    Coloured are VisPruner and the methods on the Pareto front, which no other beats for as few FLOPs; dashed are the
    baselines, grey all others.

    Parameters
    ----------
    result
        A leaderboard.
    path
        PNG or SVG, by its ending.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    costed = [row for row in result["rows"] if row["cost"] is not None]
    for row in costed:
        lines.setdefault(row["method"], []).append(row)
    names = dict.fromkeys(name for name in _front(costed) if name != ALWAYS and name not in BASELINES)
    colors = dict(zip(names, FRONT, strict=False))
    colors[ALWAYS] = ACCENT
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot()
    labels = []
    for name, rows in sorted(lines.items(), key=lambda item: item[0] in colors):
        points = sorted(map(_point, rows))
        style: dict[str, Any] = {"color": PALE, "linewidth": 1, "markersize": 3, "zorder": 1}
        if name in BASELINES:
            style = {"color": GRAY, "linewidth": 1.2, "markersize": 4, "linestyle": "--", "zorder": 2}
        if name in colors:
            style = {"color": colors[name], "linewidth": 2, "markersize": 5, "zorder": 3}
        axes.plot(*zip(*points, strict=True), marker="o", **style)
        if name in BASELINES or name in colors:
            labels.append((points[0], name, style["color"]))
    for ((x, y), name, color), height in zip(sorted(labels), _apart([xy for xy, _, _ in sorted(labels)]), strict=True):
        axes.annotate(
            name, (x, y), xytext=(x - 1.2, height), ha="right", va="center", color=color, fontsize=9,
            fontweight="bold" if name in colors else "normal",
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
        # Without a date and with fixed ids, the same leaderboard gives the same file.
        with rc_context({"svg.hashsalt": "foveate"}):
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(path)!r}: {error}") from error


def _point(row: Mapping[str, Any]) -> tuple[float, float]:
    return 100 * row["cost"]["of_unpruned"], row["relative"]["average"]


def _front(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the methods of the rows that no other row beats or equals at no more FLOPs."""
    best, front = float("-inf"), []
    for row in sorted(rows, key=lambda row: (_point(row)[0], -_point(row)[1])):
        if _point(row)[1] > best:
            best = _point(row)[1]
            front.append(row["method"])
    return front


def _apart(points: Sequence[tuple[float, float]], width: float = 12, height: float = 3) -> list[float]:
    """Return where labels of points go vertically so that neighbours do not cover each other."""
    places: dict[int, float] = {}
    for i in sorted(range(len(points)), key=lambda i: points[i][1]):
        x, y = points[i]
        below = [place for j, place in places.items() if abs(points[j][0] - x) < width]
        places[i] = max([y, *(place + height for place in below if y - place < height)])
    return [places[i] for i in range(len(points))]
