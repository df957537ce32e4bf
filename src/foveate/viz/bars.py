"""Bars: where the time of each arm of a bench goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from foveate.measure.timing import STAGES

_COLOURS = {"vision": "#12b5cb", "select": "#e8710a", "prefill": "#5b4bb5", "decode": "#c6c3dd"}


def draw(result: Mapping[str, Any], title: str = "") -> Figure:
    """Draw one bar per arm of what `foveate bench model` returns, divided into stages, with memory beside it."""
    arms = result["arms"]
    figure = Figure(figsize=(9, 0.55 * len(arms) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [f"{row['arm']}, {row['tokens']:g} tokens" for row in arms]
    left = [0.0] * len(arms)
    for stage in STAGES:
        widths = [row["time"][stage]["median_ms"] / 1e3 for row in arms]
        axes.barh(names, widths, left=left, height=0.62, color=_COLOURS[stage], label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, (row, end) in enumerate(zip(arms, left, strict=True)):
        first, peak = row["time"]["first_token"]["median_ms"] / 1e3, row["peak_bytes"]["total"] / 2**20
        note = f" first token {first:.2f} s, peak {peak:,.0f} MiB"
        axes.text(end, i, note, va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.45)
    axes.set_xlabel("seconds, median")
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False)
    return figure


def save(path: str | Path, result: Mapping[str, Any], title: str = "") -> None:
    """Write what `draw` draws as a PNG file."""
    draw(result, title).savefig(path, format="png", dpi=150, metadata={"Software": "foveate"})
