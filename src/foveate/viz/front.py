"""Loss against cost of the candidates of a search, with their Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from foveate.tune.candidates import CONTROLS

_METHOD, _CONTROL, _FRONT, _WISH = "#5b4bb5", "#e8710a", "#12b5cb", "#9a9a9a"


def draw(result: Mapping[str, Any]) -> Figure:
    """Draw the report of `foveate tune`: the upper bound of each candidate's loss against its cost."""
    by, best = result["wish"]["by"], result["winner"] or result["closest"]
    points = {
        row["candidate"]: (_cost(row["rungs"][-1], by), row["rungs"][-1]["loss"], row["rungs"][-1]["prompts"])
        for row in result["candidates"]
        if row["rungs"]
    }
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    most = max((prompts for _, _, prompts in points.values()), default=1)
    for controls, colour, label in ((False, _METHOD, "methods"), (True, _CONTROL, "controls")):
        for whole in (False, True):
            own = [
                (cost, loss["at_most"])
                for name, (cost, loss, prompts) in points.items()
                if (name.split()[0] in CONTROLS) == controls and (prompts == most) == whole
            ]
            axes.scatter(
                [100 * x for x, _ in own], [100 * y for _, y in own], s=34 if whole else 16, color=colour,
                alpha=1.0 if whole else 0.35, linewidths=0, zorder=3,
                label=f"{label}, {f'{most} prompts' if whole else 'given up earlier'}" if own else None,
            )  # fmt: skip
    for name in result["front"]:
        cost, loss, _ = points[name]
        axes.plot([100 * cost] * 2, [100 * loss["value"], 100 * loss["at_most"]], color=_FRONT, linewidth=1, zorder=2)
    steps = [(100 * points[name][0], 100 * points[name][1]["at_most"]) for name in result["front"]]
    if steps:
        axes.step(*zip(*steps, strict=True), where="post", color=_FRONT, linewidth=1.6, zorder=2, label="Pareto front")
    _label(axes, dict(zip(result["front"], steps, strict=True)), best)
    if result["wish"]["speedup"] is not None:
        axes.axvline(100 / result["wish"]["speedup"], color=_WISH, linestyle="--", linewidth=1, label="wish")
    else:
        axes.axhline(100 * result["wish"]["max_loss"], color=_WISH, linestyle="--", linewidth=1, label="wish")
    axes.set_xlabel(f"{'time' if by == 'time' else 'FLOPs of the prefill'}, % of the unpruned model")
    loss = "drop of accuracy" if result["labelled"] else "answers that change"
    axes.set_ylabel(f"{loss}, %: at most, with {result['wish']['confidence']:.0%} confidence")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    outcome = "fulfils" if result["winner"] else "comes closest to"
    title = f"{best} {outcome} the wish: {result['wish']['text']}" if best else "no candidate ran"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _label(axes: Any, points: Mapping[str, tuple[float, float]], best: str | None) -> None:
    """Name points, the best first; a name that would cover another one is left out."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    placed: list[tuple[float, float]] = []
    for name in sorted(points, key=lambda name: name != best):
        x, y = points[name]
        place = (x - left) / (right - left), (y - bottom) / (top - bottom)
        if all(abs(place[0] - a) > 0.16 or abs(place[1] - b) > 0.045 for a, b in placed):
            placed.append(place)
            axes.annotate(
                name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8.5, zorder=4,
                fontweight="bold" if name == best else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            )  # fmt: skip


def _cost(standing: Mapping[str, Any], by: str) -> float:
    return float(standing["time"]["value"] if by == "time" else standing["flops"])


def save(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write what `draw` draws as a PNG file."""
    draw(result).savefig(path, format="png", dpi=150, metadata={"Software": "foveate"})
