"""What each patch of a scene shows: the supervision of the vision tower."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from foveate.nano.drawing import SIDE
from foveate.nano.scenes import Plan
from foveate.nano.vocabulary import ALL_COLORS, KINDS, REGIONS

PATCH: Final = 12
GRID: Final = SIDE // PATCH
TOKENS: Final = GRID * GRID
IGNORE: Final = -1
# Columns of a label table: kind (0 = background), colour, region, digit, 1 where an object has its centre.
KIND, COLOR, REGION, DIGIT, CENTER = range(5)
COLUMNS: Final = 5
MOSTLY, BARELY = 0.18, 0.04
CONCEPTS: Final = len(KINDS) + len(ALL_COLORS) + len(REGIONS) + 10 + len(ALL_COLORS)


def patch_labels(plan: Plan, owner: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Label every patch of a drawn plan.

    Patches that an object covers a little are neither object nor background: kind and colour are ``IGNORE`` there.
    The region of an object's patches is that of the object's centre, so that one patch tells where the object is.

    Parameters
    ----------
    plan : Plan
        What is shown.
    owner : numpy.ndarray
        uint8 ``[192, 192]`` from ``render``.

    Returns
    -------
    numpy.ndarray
        int8 ``[256, 5]`` in raster order: kind, colour, region, digit, centre.
    """
    labels = np.empty((GRID, GRID, COLUMNS), np.int8)
    cells = ((np.arange(GRID) + 0.5) * 3 / GRID).astype(np.int8)
    labels[..., KIND] = 0
    labels[..., COLOR] = ALL_COLORS.index(plan.background)
    labels[..., REGION] = cells[:, None] * 3 + cells
    labels[..., DIGIT] = IGNORE
    labels[..., CENTER] = 0
    tiles = owner.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID, GRID, -1)
    most = np.zeros((GRID, GRID), np.float32)
    for number, item in enumerate(plan.objects, start=1):
        share = (tiles == number).mean(-1, dtype=np.float32)
        labels[(share > BARELY) & (most < MOSTLY), :2] = IGNORE
        x, y = item.center
        row, column = int(y // PATCH), int(x // PATCH)
        share[row, column] = 1.0
        seen = (share > MOSTLY) & (share > most)
        most = np.maximum(most, share)
        values = (KINDS.index(item.kind) + 1, ALL_COLORS.index(item.color), REGIONS.index(item.region))
        labels[seen, :3] = values
        labels[seen, DIGIT] = IGNORE if item.digit is None else item.digit
        labels[seen, CENTER] = 0
        labels[row, column, CENTER] = 1
    return labels.reshape(TOKENS, COLUMNS)


def concepts(labels: NDArray[np.int8]) -> NDArray[np.float32]:
    """What an image shows as a whole: the supervision of ``[CLS]``.

    Parameters
    ----------
    labels : numpy.ndarray
        int8 ``[B, 256, 5]``.

    Returns
    -------
    numpy.ndarray
        float32 ``[B, CONCEPTS]`` of 0 and 1: kinds, colours and regions of objects, digits, background colour.
    """
    found = np.zeros((len(labels), CONCEPTS), np.float32)
    kind, color, region, digit = (labels[..., column].astype(np.int64) for column in (KIND, COLOR, REGION, DIGIT))
    image = np.broadcast_to(np.arange(len(labels))[:, None], kind.shape)
    is_object, is_background = kind > 0, kind == 0
    start = 0
    for values, chosen, size in (
        (kind - 1, is_object, len(KINDS)),
        (color, is_object, len(ALL_COLORS)),
        (region, is_object, len(REGIONS)),
        (digit, digit >= 0, 10),
        (color, is_background, len(ALL_COLORS)),
    ):
        found[image[chosen], start + values[chosen]] = 1.0
        start += size
    return found
