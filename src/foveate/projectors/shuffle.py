"""Pixel shuffle: the patches of a window side by side, in InternVL's and Idefics' forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.projectors.base import Compressor, Grid, Projector, Sizes, as_maps, divided, regions, register_projector


@register_projector("pixel_shuffle")
@dataclass(frozen=True)
class PixelShuffle(Projector):
    """Space to depth: each window of `ratio` x `ratio` patches becomes one token of as many times the channels.

    Parameters
    ----------
    ratio
        Patches along a side of a window.
    head
        ``"mlp"``: layer norm and two linear layers with a GELU, as InternVL; ``"linear"``: one without bias, as
        Idefics3.
    version
        2 gives tokens in raster order; 1, of early InternVL, columns first.
    """

    ratio: int = 2
    head: Literal["mlp", "linear"] = "mlp"
    version: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if self.head not in ("mlp", "linear") or self.version not in (1, 2):
            raise InputError(
                f"pixel_shuffle has head='mlp' or 'linear' and version=1 or 2: not {self.head!r} and {self.version!r}"
            )

    def cells(self, grid: Grid) -> Grid:
        return divided(self.name, grid, self.ratio)

    def build(self, sizes: Sizes) -> Compressor:
        return Shuffled(sizes, self)


class Shuffled(Compressor):
    """Windows of patches, their channels in the order row, column, channel; then the head."""

    def __init__(self, sizes: Sizes, config: PixelShuffle) -> None:
        super().__init__(sizes)
        self.cells, self.version = config.cells(sizes.grid), config.version
        wide, last = config.ratio**2 * sizes.features, nn.Linear(sizes.width, sizes.width)
        self.head = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, sizes.width), nn.GELU(), last)
        if config.head == "linear":
            self.head = nn.Sequential(nn.Linear(wide, sizes.width, bias=False))

    @property
    def output(self) -> nn.Linear:
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        return last

    def windows(self, features: Tensor) -> Tensor:
        """Return ``[B, M, ratio² C]`` of features ``[B, N, C]``."""
        self.maps(features)  # refuses other grids
        rows = regions(features, self.sizes.grid, self.cells).flatten(2)
        return rows if self.version == 2 else as_maps(rows, self.cells).transpose(2, 3).flatten(2).transpose(1, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, M, D]``."""
        return self.head(self.windows(features))  # type: ignore[no-any-return]
