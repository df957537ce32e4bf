"""Overlays: kept tokens bright, the others dimmed, and the saliency that the method read beside them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from foveate.core.selection import Selection
from foveate.core.spans import Crop, Span
from foveate.viz.fate import Fate, fate, hue
from foveate.viz.panels import Panel, edges, grid_of, panels

INK, SOFT_INK, NIGHT = "#1d2433", "#66708a", np.array([0.08, 0.10, 0.15])
_KEPT_EDGE = "#12b5cb"
_TINT = 0.5
_LUMA = np.array([0.299, 0.587, 0.114])
# Inches: width of a panel, space after it, place for a colour bar, height of a panel's heading, margin of the figure.
_PANEL, _GAP, _BAR, _LABEL, _MARGIN = 4.6, 0.3, 0.75, 0.3, 0.3


def highlight(picture: NDArray[np.float64], crops: Sequence[Crop], shown: Fate) -> NDArray[np.float64]:
    """Dim and desaturate a picture except where tokens reach the language model; tint those that share a token.

    Parameters
    ----------
    picture
        ``[H, W, 3]``, 0 to 1.
    crops
        Crops whose boxes are shares of this picture.
    shown
        What became of the tokens of the span.

    Returns
    -------
    numpy.ndarray
        ``[H, W, 3]``, 0 to 1.
    """
    alive = paint(np.zeros((*picture.shape[:2], 1)), crops, shown.alive[:, None].astype(float)) > 0
    groups = shown.shared()
    colors = np.array([[*hue(number), _TINT] if number >= 0 else [0.0] * 4 for number in groups.tolist()])
    tint = paint(np.zeros((*picture.shape[:2], 4)), crops, colors)
    grey = (picture @ _LUMA)[..., None]
    dimmed = NIGHT + 0.30 * (0.8 * grey + 0.2 * picture)
    bright = picture * (1 - tint[..., 3:]) + tint[..., :3] * tint[..., 3:]
    return np.where(alive, bright, dimmed)


def paint(canvas: NDArray[np.float64], crops: Sequence[Crop], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fill the patch of each token of some crops on a canvas ``[H, W, C]`` with its value of ``[N, C]``."""
    for crop in crops:
        rows, columns = edges(crop, *canvas.shape[:2])
        cells = values[crop.index.numpy()].reshape(*grid_of(crop), -1)
        cells = np.repeat(np.repeat(cells, np.diff(rows), axis=0), np.diff(columns), axis=1)
        canvas[rows[0] : rows[-1], columns[0] : columns[-1]] = cells
    return canvas


def draw(
    pictures: Sequence[Sequence[Image.Image]],
    spans: Sequence[Span],
    selection: Selection,
    saliency: Sequence[Tensor] | None = None,
    title: str = "",
    caption: str = "",
) -> Figure:
    """Draw what was kept of each span.

    Parameters
    ----------
    pictures
        For each span its picture, or one picture per crop (video frames): what the encoder saw.
    spans, selection
        The tokens, and the decision on them.
    saliency
        ``[n]`` per crop, crops counted through all spans; `None` draws no heat maps.
    title, caption
        Text above the panels: the method, and below it for instance question and answer.
    """
    shown, fates = panels(pictures, spans), [fate(chosen) for chosen in selection]
    per_row = 1 if len(shown) <= 2 else 2
    lines = [shown[i : i + per_row] for i in range(0, len(shown), per_row)]
    heights = [_PANEL * tallest(line) for line in lines]
    pair = _PANEL + _GAP + (_PANEL + _BAR if saliency is not None else 0.0)
    width = 2 * _MARGIN + pair * min(per_row, len(shown)) - _GAP
    wrapped = fill(caption, int(12.5 * (width - 2 * _MARGIN)))
    head = 0.5 + (0.21 * (wrapped.count("\n") + 1) + 0.12 if wrapped else 0.0)
    height = head + sum(heights) + (_LABEL + _MARGIN) * len(lines)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    left = _MARGIN / width
    figure.text(left, 1 - 0.22 / height, plain(title), size=13, weight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.53 / height, plain(wrapped), size=10, color=SOFT_INK, va="top", linespacing=1.35)
    top = head
    for line, tall in zip(lines, heights, strict=True):
        top += _LABEL
        for i, panel in enumerate(line):
            x, y = _MARGIN + pair * i, height - top - tall
            axes = figure.add_axes((x / width, y / height, _PANEL / width, tall / height))
            draw_tokens(axes, panel, fates[panel.span])
            if saliency is not None:
                x += _PANEL + _GAP
                axes = figure.add_axes((x / width, y / height, _PANEL / width, tall / height))
                draw_saliency(axes, panel, [saliency[i] for i in panel.numbers])
                _outline(axes, panel, fates[panel.span])
                axes.set_title("attention that the encoder pays to each token", size=9.5, color=INK, loc="left", pad=5)
        top += tall + _MARGIN
    return figure


def save(path: str | Path, *args: Any, **kwargs: Any) -> None:
    """Write what `draw` draws as a PNG file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a question in a script that the font lacks
        draw(*args, **kwargs).savefig(path, format="png", metadata={"Software": "foveate"})


def draw_tokens(axes: Any, panel: Panel, shown: Fate) -> None:
    """Draw a panel with kept tokens bright and outlined, merged ones in the colour of their token, the others dim."""
    index = torch.cat([crop.index for crop in panel.crops]).numpy()
    figures = " ".join(filter(None, (panel.label + ":" if panel.label else "", told(shown, index))))
    axes.imshow(highlight(panel.pixels, panel.crops, shown), interpolation="bilinear")
    _outline(axes, panel, shown)
    frame(axes, panel)
    axes.set_title(figures, size=9.5, color=INK, loc="left", pad=5)


def draw_saliency(axes: Any, panel: Panel, saliency: Sequence[Tensor]) -> None:
    """Draw the saliency ``[n]`` of each crop of a panel as a heat map with a colour bar."""
    values = torch.cat(list(saliency))
    norm = PowerNorm(0.5, vmin=float(values.min()), vmax=float(values.max()))
    axes.imshow(panel.pixels @ _LUMA, cmap="gray", vmin=0.0, vmax=1.0, interpolation="bilinear")
    for crop, heat in zip(panel.crops, saliency, strict=True):
        y, x = edges(crop, *panel.pixels.shape[:2])
        image = axes.imshow(
            heat.reshape(grid_of(crop)).numpy(), cmap="inferno", norm=norm, alpha=0.85, interpolation="nearest",
            extent=(x[0] - 0.5, x[-1] - 0.5, y[-1] - 0.5, y[0] - 0.5),
        )  # fmt: skip
    frame(axes, panel)
    bar = axes.figure.colorbar(
        image, cax=axes.inset_axes((1.02, 0.0, 0.03, 1.0)), format=lambda share, _: f"{100 * share:.3g}%"
    )
    height, width = panel.pixels.shape[:2]
    bar.locator = MaxNLocator(5 if 2 * height > width else 2)  # labels of a low bar would cover each other
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=SOFT_INK, length=2)


def frame(axes: Any, panel: Panel) -> None:
    """Fit axes to a panel, without ticks or borders."""
    height, width = panel.pixels.shape[:2]
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[], aspect="equal", anchor="NW")
    for spine in axes.spines.values():
        spine.set_visible(False)


def told(shown: Fate, index: NDArray[np.int64]) -> str:
    """Say in words what became of the tokens of a span at `index`."""
    counts = Fate(shown.places[index], shown.into[index]).counts()
    merged = f", merged {counts['merged']}" if counts["merged"] else ""
    return f"kept {counts['kept']}{merged} of {len(index)} tokens"


def tallest(line: Sequence[Panel]) -> float:
    """Return the height of a row of panels as a share of their width."""
    ratios = [panel.picture.height / panel.picture.width for panel in line]
    return float(np.clip(ratios, 0.2, 1.4).max())


def plain(text: str) -> str:
    """Return text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _outline(axes: Any, panel: Panel, shown: Fate) -> None:
    """Draw thin frames around the kept patches."""
    boxes = []
    for crop in panel.crops:
        y, x = edges(crop, *panel.pixels.shape[:2])
        for r, c in np.argwhere(shown.places[crop.index.numpy()].reshape(grid_of(crop))):
            boxes.append(Rectangle((x[c] - 0.5, y[r] - 0.5), x[c + 1] - x[c], y[r + 1] - y[r]))
    axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=_KEPT_EDGE, linewidth=0.8))
