"""What stands between the vision encoder and the LLM in a model with a trained compressor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.core.errors import InputError

Grid = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model that a projector is built for.

    Attributes
    ----------
    features
        Channels C of one layer of the vision encoder.
    width
        Channels D of the LLM.
    grid
        Rows and columns of patches of one picture or tile.
    """

    features: int
    width: int
    grid: Grid

    @property
    def patches(self) -> int:
        """Patches N of one picture or tile."""
        return math.prod(self.grid)


@dataclass(frozen=True, eq=False)
class Installed:
    """What a compressor is in its model.

    Attributes
    ----------
    projector
        Its configuration.
    start
        How it was initialised: ``"pool"`` or ``"paper"``.
    tokens
        How many tokens it makes of a picture, M.
    cells
        Rows and columns of these; `None` if they lie on no grid.
    stock
        The model's own projector, and the feature layers of its configuration, which are saved with the model.
    """

    projector: Any
    start: str
    tokens: int
    cells: Grid | None
    stock: tuple[nn.Module, int | list[int]]


class Compressor(nn.Module):
    """The module of a projector: ``[B, N, L C]`` features of L layers, side by side, to ``[B, M, D]`` tokens.

    Parameters
    ----------
    sizes
        Of the model.
    """

    installed: Installed | None = None
    """What it is in a model; `None` while it is in none."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    @property
    def output(self) -> nn.Linear:
        """The last layer, zeros in which make all zero.

        Raises
        ------
        InputError
            If the module has none, and so cannot start as what is added to another.
        """
        raise InputError(f"{type(self).__name__} ends in no linear layer: use start='paper'")

    def maps(self, features: Tensor) -> Tensor:
        """Return features ``[B, N, K]`` as maps ``[B, K, H, W]``.

        Raises
        ------
        InputError
            If they are not those of a whole grid.
        """
        if features.shape[1] != self.sizes.patches:
            height, width = self.sizes.grid
            raise InputError(
                f"this projector was built for {height} x {width} = {self.sizes.patches} patches, and got "
                f"{features.shape[1]}: build it for the grid of the model"
            )
        return features.transpose(1, 2).reshape(len(features), -1, *self.sizes.grid)
