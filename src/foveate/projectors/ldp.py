"""LDPv2 of MobileVLM V2: two linear layers, pooling, and a depth-wise convolution that tells places."""

from __future__ import annotations

from collections.abc import Sequence
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
    adds_features = False

    def cells(self, grid: Grid) -> Grid:
        return square(self.name, self.tokens, grid)

    def retrofit(
        self, sizes: Sizes, stock: nn.Module, stock_layers: Sequence[int], branch_layers: Sequence[int]
    ) -> Compressor:
        module = Ldp(sizes, self.cells(sizes.grid), stock)
        nn.init.zeros_(module.peg.weight)
        nn.init.zeros_(module.peg.bias)  # type: ignore[arg-type]
        return module

    def build(self, sizes: Sizes) -> Compressor:
        return Ldp(sizes, self.cells(sizes.grid), Mlp(sizes.features, sizes.width))


class Ldp(Compressor):
    """A projector; the mean over cells; and a 3 x 3 depth-wise convolution that is added to its input."""

    def __init__(self, sizes: Sizes, cells: Grid, mlp: nn.Module) -> None:
        super().__init__(sizes)
        self.cells, self.mlp = cells, mlp
        self.peg = nn.Conv2d(sizes.width, sizes.width, 3, padding=1, groups=sizes.width)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, M, D]``."""
        maps = as_maps(pooled(self.maps(self.mlp(features)), self.cells), self.cells)
        return (maps + self.peg(maps)).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
