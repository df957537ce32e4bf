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
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from foveate.errors import InputError
from foveate.selection import Selection, SpanSelection
from foveate.tokens import Crop, Span

Box: TypeAlias = tuple[float, float, float, float]

_LONG_SIDE = 960
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_INK, _SOFT_INK, _NIGHT = "#1d2433", "#66708a", np.array([0.09, 0.11, 0.16])
_LUMA = np.array([0.299, 0.587, 0.114])
_PANEL = 4.6  # inches


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
    dimmed = 0.30 * (0.75 * grey + 0.25 * picture) + 0.70 * (0.25 * grey + 0.75 * _NIGHT)
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
    per_row, width = 1 if len(panels) <= 2 else 2, 1 if saliency is None else 2
    lines = -(-len(panels) // per_row)
    heights = [_PANEL * _tallest(panels[i * per_row : (i + 1) * per_row]) + 0.45 for i in range(lines)]
    wrapped = fill(caption, 52 * width * per_row)
    head = 0.62 + 0.22 * (wrapped.count("\n") + 1 if wrapped else 0)
    size = ((_PANEL + 0.25) * width * per_row + 0.45 * (width - 1) * per_row, sum(heights) + head)
    figure = Figure(figsize=size, dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        lines, width * per_row, height_ratios=heights, left=0.02, right=0.98 - 0.05 * (width - 1),
        top=1 - head / size[1], bottom=0.12 / size[1], wspace=0.05, hspace=0.12,
    )  # fmt: skip
    figure.text(0.02, 1 - 0.18 / size[1], _plain(title), size=12, weight="bold", color=_INK, va="top")
    figure.text(0.02, 1 - 0.47 / size[1], _plain(wrapped), size=9.5, color=_SOFT_INK, va="top", linespacing=1.35)
    for i, panel in enumerate(panels):
        row, column = divmod(i, per_row)
        _draw_kept(figure.add_subplot(grid[row, column * width]), panel)
        if panel.saliency is not None:
            _draw_heat(figure, figure.add_subplot(grid[row, column * width + 1]), panel)
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
            panels.append(_Panel(array, crops, values, chosen, _label(span, group, crops)))
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
    left, top, right, bottom = crop.box
    rows, columns = _grid(crop)
    y = np.linspace(top * shape[0], bottom * shape[0], rows + 1).round().astype(np.int64)
    x = np.linspace(left * shape[1], right * shape[1], columns + 1).round().astype(np.int64)
    return y, x


def _outlines(panel: _Panel) -> list[Rectangle]:
    boxes = []
    for crop in panel.crops:
        y, x = _edges(crop, panel.picture.shape)
        stays = torch.isin(crop.index, panel.chosen.kept.cpu()).reshape(_grid(crop))
        for r, c in stays.nonzero().tolist():
            boxes.append(Rectangle((x[c], y[r]), x[c + 1] - x[c], y[r + 1] - y[r]))
    return boxes


def _frame(axes: Any, panel: _Panel, title: str) -> None:
    height, width = panel.picture.shape[:2]
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[], aspect="equal", anchor="NW")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, size=9.5, color=_INK, loc="left", pad=5)


def _draw_kept(axes: Any, panel: _Panel) -> None:
    count = sum(int(torch.isin(c.index, panel.chosen.kept.cpu()).sum()) for c in panel.crops)
    total = sum(map(len, panel.crops))
    verb = "merged into" if panel.chosen.merge is not None else "kept"
    figures = f"{verb} {count} of {total} tokens" if verb == "kept" else f"{total} tokens merged into {count}"
    axes.imshow(highlight(panel.picture, panel.crops, panel.chosen.kept), interpolation="bilinear")
    axes.add_collection(
        PatchCollection(_outlines(panel), facecolor="none", edgecolor=(1.0, 1.0, 1.0, 0.75), linewidth=0.7)
    )
    _frame(axes, panel, f"{panel.label}: {figures}" if panel.label else figures)


def _draw_heat(figure: Figure, axes: Any, panel: _Panel) -> None:
    assert panel.saliency is not None
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(float(x.max()) for x in panel.saliency) or 1.0)
    grey = panel.picture @ _LUMA
    axes.imshow(grey, cmap="gray", vmin=0.0, vmax=1.0, interpolation="bilinear")
    for crop, values in zip(panel.crops, panel.saliency, strict=True):
        y, x = _edges(crop, panel.picture.shape)
        image = axes.imshow(
            values.reshape(_grid(crop)).numpy(), cmap="inferno", norm=norm, alpha=0.85, interpolation="nearest",
            extent=(x[0] - 0.5, x[-1] - 0.5, y[-1] - 0.5, y[0] - 0.5),
        )  # fmt: skip
    axes.add_collection(
        PatchCollection(_outlines(panel), facecolor="none", edgecolor=(1.0, 1.0, 1.0, 0.55), linewidth=0.5)
    )
    _frame(axes, panel, "attention that the encoder pays to each token")
    bar = figure.colorbar(image, cax=axes.inset_axes((1.02, 0.0, 0.03, 1.0)))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=7.5, colors=_SOFT_INK, length=2)


def _tallest(panels: Sequence[_Panel]) -> float:
    """Return the height of a row of panels as a share of their width."""
    ratios = [p.picture.shape[0] / p.picture.shape[1] for p in panels]
    return max(min(1.4, max(0.2, ratio)) for ratio in ratios)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")
