"""A sheet: one row of pictures per method, one column per budget, then saliency and order."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from foveate.core.errors import InputError
from foveate.measure.run import Outcome
from foveate.measure.units import show_bytes, show_flops, show_time
from foveate.viz.comparison import Comparison, reads
from foveate.viz.fate import fate
from foveate.viz.overlay import INK, NIGHT, SOFT_INK, draw_saliency, draw_tokens, frame, paint, plain, tallest
from foveate.viz.panels import Panel

# Inches: width of a panel, space after it, place for a colour bar, margin; heights of the figure's head, of a method's
# name, of the text below its panels, and of the title of a panel.
_PANEL, _GAP, _BAR, _MARGIN = 3.0, 0.25, 0.6, 0.3
_HEAD, _NAME, _TEXT, _TITLE = 1.0, 0.35, 0.75, 0.28


def sheet(comparison: Comparison) -> Figure:
    """Draw a comparison.

    A method's row holds the tokens at each budget, with answer and costs below; the attention that it reads, if any;
    and, for several budgets, the smallest of them at which each token is kept.
    """
    shown, budgets = comparison.panels, len(comparison.budgets)
    columns = budgets + int(_reads(comparison)) + int(budgets > 1)
    heights = [_PANEL * tallest([panel]) + _TITLE for panel in shown]
    row = _NAME + sum(heights) + _TEXT
    width = 2 * _MARGIN + columns * (_PANEL + _GAP) - _GAP + _BAR * int(_reads(comparison))
    height = _HEAD + row * len(comparison.arms) + _MARGIN
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)

    def text(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, plain(words), **{"va": "top", "color": INK, **style})

    letters = int(11 * width)
    text(_MARGIN, 0.22, shorten(comparison.question, letters, placeholder=" …"), size=14, weight="bold")
    unpruned = comparison.unpruned
    text(_MARGIN, 0.52, shorten(f"{comparison.model}, unpruned: {unpruned.answer}", letters, placeholder=" …"), size=10)
    text(_MARGIN, 0.73, f"{unpruned.kept} visual tokens, {_costs(unpruned)}", size=9, color=SOFT_INK)
    for i, (name, arms) in enumerate(comparison.arms.items()):
        top = _HEAD + row * i
        text(_MARGIN, top, name, size=12, weight="bold")
        y = top + _NAME
        for panel, tall in zip(shown, heights, strict=True):
            y += tall
            for column in range(columns):
                x = _MARGIN + column * (_PANEL + _GAP) + (_BAR if column > budgets and _reads(comparison) else 0.0)
                box = (x / width, 1 - y / height, _PANEL / width, (tall - _TITLE) / height)
                _draw(figure, box, comparison, name, panel, column)
        for column, arm in enumerate(arms):
            same = "the same as unpruned" if arm.answer == unpruned.answer else "differs from unpruned"
            x = _MARGIN + column * (_PANEL + _GAP)
            text(x, y + 0.08, shorten(f"{arm.answer}  ({same})", 52, placeholder=" …"), size=9.5)
            text(x, y + 0.28, _costs(arm), size=8.5, color=SOFT_INK)
            if arm.equivalent != arm.kept:
                text(x, y + 0.45, f"mean over layers: {arm.equivalent:,.1f} tokens", size=8.5, color=SOFT_INK)
    return figure


def save_sheet(path: Path, comparison: Comparison) -> None:
    """Write what `sheet` draws as a PNG file."""
    try:
        sheet(comparison).savefig(path, format="png", metadata={"Software": "foveate"})
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error


def steps(count: int) -> list[str]:
    """Return the colours of `count` budgets, from few tokens to many, as ``#rrggbb``."""
    colors = matplotlib.colormaps["plasma_r"](np.linspace(0.05, 0.85, count))
    return [matplotlib.colors.to_hex(color) for color in colors]


def _reads(comparison: Comparison) -> bool:
    return any(arm.saliency is not None for arms in comparison.arms.values() for arm in arms)


def _costs(arm: Outcome) -> str:
    flops = "" if arm.cost is None else f"{show_flops(arm.cost.total)}FLOPs · "
    return f"{flops}KV {show_bytes(arm.kv_bytes)} · {show_time(arm.seconds['total'])}"


def _draw(figure: Figure, box: Any, comparison: Comparison, name: str, panel: Panel, column: int) -> None:
    arms, budgets = comparison.arms[name], len(comparison.budgets)
    if column < budgets:
        draw_tokens(figure.add_axes(box), panel, fate(arms[column].selection[panel.span]))
        return
    if column == budgets and _reads(comparison):
        saliency, axes = arms[-1].saliency, figure.add_axes(box)
        if saliency is None:
            frame(axes, panel)
        else:
            draw_saliency(axes, panel, [saliency[i] for i in panel.numbers])
        title = f"reads {reads(arms[-1])}" if saliency is None else "attention that it reads"
        axes.set_title(title, size=9.5, color=INK, loc="left", pad=5)
        return
    axes = figure.add_axes(box)
    axes.imshow(_ordered(panel, comparison.order(name)[panel.span], budgets), interpolation="bilinear")
    frame(axes, panel)
    axes.set_title("smallest budget that keeps it", size=9.5, color=INK, loc="left", pad=5)
    labels = [Patch(color=c, label=b) for c, b in zip(steps(budgets), comparison.budgets, strict=True)]
    axes.legend(
        handles=labels, loc="upper left", bbox_to_anchor=(0, 0), ncols=min(budgets, 4), frameon=False, fontsize=8.5,
        borderpad=0.2, handlelength=1, columnspacing=1, borderaxespad=0.2,
    )  # fmt: skip


def _ordered(panel: Panel, first: NDArray[np.int64], budgets: int) -> NDArray[np.float64]:
    """Tint the tokens by the smallest budget that keeps them, and dim the others."""
    colors = np.array([[*to_rgb(color), 0.75] for color in steps(budgets)] + [[*NIGHT, 0.75]])
    tint = paint(np.zeros((*panel.pixels.shape[:2], 4)), panel.crops, colors[first])
    return panel.pixels * (1 - tint[..., 3:]) + tint[..., :3] * tint[..., 3:]
