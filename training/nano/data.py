"""Training images and labels on disk: drawn once, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foveate.nano.drawing import SIDE
from foveate.nano.labels import COLUMNS, TOKENS, patch_labels
from foveate.nano.scenes import generator, plan_scene, render


class Drawn(NamedTuple):
    """Images uint8 ``[N, 192, 192, 3]`` and labels int8 ``[N, 256, 5]`` of one split."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int8]


def table(path: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Open a memory-mapped ``.npy`` table for writing, creating it (filled with zeros) if it is not there."""
    if path.exists():
        return np.lib.format.open_memmap(path, mode="r+")
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def open_drawn(folder: Path, split: str, count: int) -> Drawn:
    """Open or create the tables of one split.

    Parameters
    ----------
    folder : Path
        Where the tables live.
    split : str
        Name of the split.
    count : int
        Number of images.

    Returns
    -------
    Drawn
        Memory-mapped, writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = table(folder / f"{split}-images.npy", "uint8", (count, SIDE, SIDE, 3))
    labels = table(folder / f"{split}-labels.npy", "int8", (count, TOKENS, COLUMNS))
    return Drawn(images, labels)  # type: ignore[arg-type]


def draw(drawn: Drawn, split: str, seed: int, index: int) -> None:
    """Draw one scene into the tables."""
    plan = plan_scene(split, seed, index)
    image, owner = render(plan, generator(split, seed, index, "pixels"))
    drawn.labels[index] = patch_labels(plan, owner)
    drawn.images[index] = np.asarray(image)
