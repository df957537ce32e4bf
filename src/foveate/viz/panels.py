"""Panels: crops that share one picture without covering each other, and where their tokens lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveate.core.errors import InputError
from foveate.core.spans import Crop, Span

Box: TypeAlias = tuple[float, float, float, float]

# The most that a picture is drawn longer than it is wide, or the other way round: a strip would show no tokens.
_ASPECT = 5

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Panel:
    """A whole image, all tiles of one, or a video frame.

    Attributes
    ----------
    picture
        What its crops show.
    span
        Which span the crops belong to.
    crops
        Those shown here.
    numbers
        Their numbers among the crops of all spans.
    label
        What tells the panel from others of its span; empty if there are none.
    long_side
        Longer side of the drawn picture, in pixels.
    """

    picture: Image.Image
    span: int
    crops: tuple[Crop, ...]
    numbers: tuple[int, ...]
    label: str
    long_side: int

    @cached_property
    def pixels(self) -> NDArray[np.float64]:
        """The picture at the size of drawing, ``[H, W, 3]``, 0 to 1; a strip is stretched."""
        scale = self.long_side / max(self.picture.size)
        width, height = (max(self.long_side // _ASPECT, round(side * scale)) for side in self.picture.size)
        return np.asarray(self.picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)) / 255.0


def panels(pictures: Sequence[Sequence[Image.Image]], spans: Sequence[Span], long_side: int = 960) -> list[Panel]:
    """Return the panels of all spans in order.

    Parameters
    ----------
    pictures
        For each span its picture, or one picture per crop (video frames): what the encoder saw.
    long_side
        See `Panel`.

    Raises
    ------
    InputError
        If a span has another number of pictures.
    """
    result, first = [], 0
    for i, (span, shown) in enumerate(zip(spans, pictures, strict=True)):
        if len(shown) not in (1, len(span.crops)):
            raise InputError(f"a span of {len(span.crops)} crops needs one picture or one per crop, not {len(shown)}")
        for group in _groups(span, len(shown) > 1):
            crops = tuple(span.crops[j] for j in group)
            picture = shown[group[0] if len(shown) > 1 else 0]
            numbers = tuple(first + j for j in group)
            label = _label(span, group, crops)
            if len(spans) > 1:
                label = f"{span.kind} {1 + span.ordinal}, {label}" if label else f"{span.kind} {1 + span.ordinal}"
            result.append(Panel(picture, i, crops, numbers, label, long_side))
        first += len(span.crops)
    return result


def _groups(span: Span, own_pictures: bool) -> list[list[int]]:
    """Put the tiles of a picture together; crops that show a whole picture stand alone."""
    groups: list[list[int]] = []
    for i, crop in enumerate(span.crops):
        tile = crop.box != WHOLE and not own_pictures
        if tile and groups and span.crops[groups[-1][-1]].box != WHOLE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _label(span: Span, group: list[int], crops: Sequence[Crop]) -> str:
    if span.kind == "video":
        return f"frame {group[0] + 1}"
    if len(span.crops) == 1:
        return ""
    return f"{len(crops)} tiles" if crops[0].box != WHOLE else "overview"


def grid_of(crop: Crop) -> tuple[int, int]:
    """Return the rows and columns of a crop's tokens, or raise `InputError` if they fill no rectangle."""
    if crop.grid is None:
        raise InputError("only spans as the family describes them can be drawn: these crops were thinned out before")
    return crop.grid


def edges(crop: Crop, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixel rows and columns at which the patches of a crop begin, and the ends of the last ones."""
    if crop.box is None:
        raise InputError("the inputs do not tell where the tiles lie: draw the spans that `Family.located` returns")
    left, top, right, bottom = crop.box
    rows, columns = grid_of(crop)
    y = np.linspace(top * height, bottom * height, rows + 1).round().astype(np.int64)
    x = np.linspace(left * width, right * width, columns + 1).round().astype(np.int64)
    return y, x
