"""Overlays: kept tokens bright, the others dimmed, and the saliency that the method read beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, TypeAlias

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

from foveate.errors import InputError
from foveate.selection import Selection, SpanSelection
from foveate.tokens import Crop, Span

Box: TypeAlias = tuple[float, float, float, float]

_LONG_SIDE = 960
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_INK, _SOFT_INK, _NIGHT = "#1d2433", "#66708a", np.array([0.08, 0.10, 0.15])
_KEPT_EDGE = "#12b5cb"
_LUMA = np.array([0.299, 0.587, 0.114])
# Inches: width of a panel, space after it, place for a colour bar, height of a panel's heading, margin of the figure.
_PANEL, _GAP, _BAR, _LABEL, _MARGIN = 4.6, 0.3, 0.75, 0.3, 0.3


@dataclass(frozen=True, eq=False)
class _Panel:
    """Crops that share one picture without covering each other: a whole image, all tiles of one, a video frame."""

    picture: NDArray[np.float64]
    crops: list[Crop]
    saliency: list[Tensor] | None
    chosen: SpanSelection
    label: str


def highlight(picture: NDArray[np.float64], crops: Sequence[Crop], kept: Tensor) -> NDArray[np.float64]:
    """Dim and desaturate a picture except where tokens are kept.

    Parameters
    ----------
    picture
        ``[H, W, 3]``, 0 to 1.
    crops
        Crops whose boxes are shares of this picture.
    kept
        ``[K]`` int64 positions in the span.

    Returns
    -------
    numpy.ndarray
        ``[H, W, 3]``, 0 to 1.
    """
    mask = np.zeros(picture.shape[:2], dtype=bool)
    for crop in crops:
        rows, columns = _edges(crop, picture.shape)
        stays = torch.isin(crop.index, kept.cpu()).reshape(_grid(crop)).numpy()
        cells = np.repeat(np.repeat(stays, np.diff(rows), axis=0), np.diff(columns), axis=1)
        mask[rows[0] : rows[-1], columns[0] : columns[-1]] |= cells
    grey = (picture @ _LUMA)[..., None]
    dimmed = _NIGHT + 0.30 * (0.8 * grey + 0.2 * picture)
    return np.where(mask[..., None], picture, dimmed)


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
    panels = _panels(pictures, spans, selection, saliency)
    per_row = 1 if len(panels) <= 2 else 2
    lines = [panels[i : i + per_row] for i in range(0, len(panels), per_row)]
    heights = [_PANEL * _tallest(line) for line in lines]
    pair = _PANEL + _GAP + (_PANEL + _BAR if saliency is not None else 0.0)
    width = 2 * _MARGIN + pair * min(per_row, len(panels)) - _GAP
    wrapped = fill(caption, int(12.5 * (width - 2 * _MARGIN)))
    head = 0.5 + (0.21 * (wrapped.count("\n") + 1) + 0.12 if wrapped else 0.0)
    height = head + sum(heights) + (_LABEL + _MARGIN) * len(lines)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    left = _MARGIN / width
    figure.text(left, 1 - 0.22 / height, _plain(title), size=13, weight="bold", color=_INK, va="top")
    figure.text(left, 1 - 0.53 / height, _plain(wrapped), size=10, color=_SOFT_INK, va="top", linespacing=1.35)
    top = head
    for line, tall in zip(lines, heights, strict=True):
        top += _LABEL
        for i, panel in enumerate(line):
            x, y = _MARGIN + pair * i, height - top - tall
            _draw_kept(figure.add_axes((x / width, y / height, _PANEL / width, tall / height)), panel)
            if panel.saliency is not None:
                x += _PANEL + _GAP
                _draw_heat(figure, figure.add_axes((x / width, y / height, _PANEL / width, tall / height)), panel)
        top += tall + _MARGIN
    return figure


def save(path: str | Path, *args: Any, **kwargs: Any) -> None:
    """Write what `draw` draws as a PNG file."""
    draw(*args, **kwargs).savefig(path, format="png", metadata={"Software": "foveate"})


def _panels(
    pictures: Sequence[Sequence[Image.Image]],
    spans: Sequence[Span],
    selection: Selection,
    saliency: Sequence[Tensor] | None,
) -> list[_Panel]:
    panels, first = [], 0
    for span, chosen, shown in zip(spans, selection, pictures, strict=True):
        if len(shown) not in (1, len(span.crops)):
            raise InputError(f"a span of {len(span.crops)} crops needs one picture or one per crop, not {len(shown)}")
        arrays = [_array(picture) for picture in shown]
        for group in _groups(span, len(shown) > 1):
            crops = [span.crops[i] for i in group]
            values = None if saliency is None else [saliency[first + i] for i in group]
            array = arrays[group[0] if len(arrays) > 1 else 0]
            label = _label(span, group, crops)
            if len(spans) > 1:
                label = f"{span.kind} {1 + span.ordinal}, {label}" if label else f"{span.kind} {1 + span.ordinal}"
            panels.append(_Panel(array, crops, values, chosen, label))
        first += len(span.crops)
    return panels


def _groups(span: Span, own_pictures: bool) -> list[list[int]]:
    """Put the tiles of a picture together; crops that show a whole picture stand alone."""
    groups: list[list[int]] = []
    for i, crop in enumerate(span.crops):
        tile = crop.box != _WHOLE and not own_pictures
        if tile and groups and span.crops[groups[-1][-1]].box != _WHOLE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _label(span: Span, group: list[int], crops: Sequence[Crop]) -> str:
    if span.kind == "video":
        return f"frame {group[0] + 1}"
    if len(span.crops) == 1:
        return ""
    return f"{len(crops)} tiles" if crops[0].box != _WHOLE else "overview"


def _array(picture: Image.Image) -> NDArray[np.float64]:
    scale = _LONG_SIDE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return np.asarray(picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)) / 255.0


def _grid(crop: Crop) -> tuple[int, int]:
    if crop.grid is None:
        raise InputError("only spans as the family describes them can be drawn: these crops were thinned out before")
    return crop.grid


def _edges(crop: Crop, shape: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixel rows and columns at which the patches of a crop begin, and the ends of the last ones."""
    if crop.box is None:
        raise InputError("the inputs do not tell where the tiles lie: draw the spans that `Family.located` returns")
    left, top, right, bottom = crop.box
    rows, columns = _grid(crop)
    y = np.linspace(top * shape[0], bottom * shape[0], rows + 1).round().astype(np.int64)
    x = np.linspace(left * shape[1], right * shape[1], columns + 1).round().astype(np.int64)
    return y, x


def _outline(axes: Any, panel: _Panel) -> None:
    """Draw thin frames around the kept patches."""
    boxes = []
    for crop in panel.crops:
        y, x = _edges(crop, panel.picture.shape)
        stays = torch.isin(crop.index, panel.chosen.kept.cpu()).reshape(_grid(crop))
        for r, c in stays.nonzero().tolist():
            boxes.append(Rectangle((x[c] - 0.5, y[r] - 0.5), x[c + 1] - x[c], y[r + 1] - y[r]))
    axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=_KEPT_EDGE, linewidth=0.8))


def _frame(axes: Any, panel: _Panel, title: str) -> None:
    height, width = panel.picture.shape[:2]
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[], aspect="equal", anchor="NW")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, size=9.5, color=_INK, loc="left", pad=5)


def _draw_kept(axes: Any, panel: _Panel) -> None:
    count = sum(int(torch.isin(c.index, panel.chosen.kept.cpu()).sum()) for c in panel.crops)
    total = sum(map(len, panel.crops))
    merged = panel.chosen.merge is not None
    figures = f"{total} tokens merged into {count}" if merged else f"kept {count} of {total} tokens"
    # Whatever flows into a merged token is still there.
    lit = panel.chosen.kept if panel.chosen.merge is None else panel.chosen.merge.source
    axes.imshow(highlight(panel.picture, panel.crops, lit), interpolation="bilinear")
    _outline(axes, panel)
    _frame(axes, panel, f"{panel.label}: {figures}" if panel.label else figures)


def _draw_heat(figure: Figure, axes: Any, panel: _Panel) -> None:
    assert panel.saliency is not None
    values = torch.cat(panel.saliency)
    norm = PowerNorm(0.5, vmin=float(values.min()), vmax=float(values.max()))
    grey = panel.picture @ _LUMA
    axes.imshow(grey, cmap="gray", vmin=0.0, vmax=1.0, interpolation="bilinear")
    for crop, heat in zip(panel.crops, panel.saliency, strict=True):
        y, x = _edges(crop, panel.picture.shape)
        image = axes.imshow(
            heat.reshape(_grid(crop)).numpy(), cmap="inferno", norm=norm, alpha=0.85, interpolation="nearest",
            extent=(x[0] - 0.5, x[-1] - 0.5, y[-1] - 0.5, y[0] - 0.5),
        )  # fmt: skip
    _outline(axes, panel)
    _frame(axes, panel, "attention that the encoder pays to each token")
    bar = figure.colorbar(
        image, cax=axes.inset_axes((1.02, 0.0, 0.03, 1.0)), format=lambda share, _: f"{100 * share:.3g}%"
    )
    bar.locator = MaxNLocator(5)
    bar.minorticks_off()
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, colors=_SOFT_INK, length=2)


def _tallest(panels: Sequence[_Panel]) -> float:
    """Return the height of a row of panels as a share of their width."""
    ratios = [panel.picture.shape[0] / panel.picture.shape[1] for panel in panels]
    return float(np.clip(ratios, 0.2, 1.4).max())


def _plain(text: str) -> str:
    return text.replace("$", r"\$")
