"""LDPv2 of MobileVLM V2: two linear layers, pooling, and a depth-wise convolution that tells places."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from foveate.projectors.base import Compressor, Grid, Mlp, Projector, Sizes, as_maps, pooled, register_projector, square


@register_projector("ldp_v2")
@dataclass(frozen=True)
class LdpV2(Projector):
    """The lightweight downsample projector of MobileVLM V2.

    Parameters
    ----------
    tokens
        M, a square.
    """

    tokens: int = 144

    paper = "arXiv:2402.03766"

    def cells(self, grid: Grid) -> Grid:
        return square(self.name, self.tokens, grid)

    def build(self, sizes: Sizes) -> Compressor:
        return Ldp(sizes, self.cells(sizes.grid))


class Ldp(Compressor):
    """Linear, GELU, linear; the mean over cells; and a 3 x 3 depth-wise convolution that is added to its input."""

    def __init__(self, sizes: Sizes, cells: Grid) -> None:
        super().__init__(sizes)
        self.cells = cells
        self.mlp = Mlp(sizes.features, sizes.width)
        self.peg = nn.Conv2d(sizes.width, sizes.width, 3, padding=1, groups=sizes.width)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, M, D]``."""
        maps = as_maps(pooled(self.maps(self.mlp(features)), self.cells), self.cells)
        return (maps + self.peg(maps)).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
