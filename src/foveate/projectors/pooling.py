"""Average pooling, the baseline of every compressor, and Matryoshka pooling with a budget per call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.projectors.base import (
    Compressor,
    Grid,
    Mlp,
    Projector,
    Retrofit,
    Sizes,
    pooled,
    register_projector,
    square,
)


@register_projector("average_pool")
@dataclass(frozen=True)
class AveragePool(Projector):
    """The mean over cells of the grid, after or before LLaVA's two linear layers. No parameters beyond theirs.

    Parameters
    ----------
    tokens
        M, a square; where its side does not divide that of the grid, neighbouring cells overlap.
    position
        ``"after"`` the two layers or ``"before"``, which differ as these are not linear.
    """

    tokens: int = 144
    position: Literal["after", "before"] = "after"

    adds_features = False

    def __post_init__(self) -> None:
        if self.position not in ("after", "before"):
            raise InputError(f"average_pool pools 'after' or 'before' the linear layers, not {self.position!r}")

    def cells(self, grid: Grid) -> Grid:
        return square(self.name, self.tokens, grid)

    def retrofit(
        self, sizes: Sizes, stock: nn.Module, stock_layers: Sequence[int], branch_layers: Sequence[int]
    ) -> Compressor:
        if self.position == "before":
            raise InputError("average_pool averages patches with position='before', not tokens: use start='paper'")
        return Retrofit(sizes, self.cells(sizes.grid), stock, None, stock_layers)

    def build(self, sizes: Sizes) -> Compressor:
        return PooledMlp(sizes, self.cells(sizes.grid), self.position)


class PooledMlp(Compressor):
    """Two linear layers, and the mean over cells behind or in front of them."""

    def __init__(self, sizes: Sizes, cells: Grid, position: str = "after") -> None:
        super().__init__(sizes)
        self.cells, self.position = cells, position
        self.mlp = Mlp(sizes.features, sizes.width)

    @property
    def output(self) -> nn.Linear:
        return self.mlp.output

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, M, D]``."""
        if self.position == "before":
            return self.mlp(pooled(self.maps(features), self.cells))  # type: ignore[no-any-return]
        return pooled(self.maps(self.mlp(features)), self.cells)


@register_projector("m3")
@dataclass(frozen=True)
class M3(Projector):
    """Matryoshka Multimodal Models: the stock projector's tokens, pooled to one of several nested grids per call.

    Train the whole model on the mean loss over `scales`. No new parameters.

    Parameters
    ----------
    tokens
        The scale where a call names none.
    scales
        Squares whose sides divide each other and that of the grid: a model of 24 x 24 patches has 1, 9, 36, 144, 576,
        one of 16 x 16 has 1, 4, 16, 64, 256. `None`: every scale whose side divides the grid's.

    Notes
    -----
    Deviation: the authors round a scale that does not fit (100 becomes 144); here it is an error.
    """

    tokens: int = 576
    scales: tuple[int, ...] | None = None

    paper = "arXiv:2405.17430"
    adds_features = False

    def cells(self, grid: Grid) -> Grid:
        return self._cells(grid, self.tokens)

    def _cells(self, grid: Grid, tokens: int) -> Grid:
        fits = [side * side for side in range(1, min(grid) + 1) if not (grid[0] % side or grid[1] % side)]
        allowed = fits if self.scales is None else [scale for scale in self.scales if scale in fits]
        if tokens not in allowed:
            raise InputError(
                f"m3 pools {grid[0]} x {grid[1]} patches to {', '.join(map(str, allowed)) or 'no'} tokens, not {tokens}"
            )
        return square(self.name, tokens, grid)

    def num_output_tokens(self, grid: Grid, tiles: int = 1, budget: int | None = None) -> int:
        height, width = self._cells(grid, self.tokens if budget is None else budget)
        return tiles * height * width

    def retrofit(
        self, sizes: Sizes, stock: nn.Module, stock_layers: Sequence[int], branch_layers: Sequence[int]
    ) -> Compressor:
        return Scaled(sizes, self, stock)

    def build(self, sizes: Sizes) -> Compressor:
        return Scaled(sizes, self, Mlp(sizes.features, sizes.width))


class Scaled(Compressor):
    """A projector, pooled to the scale that a call names."""

    def __init__(self, sizes: Sizes, config: M3, mlp: nn.Module) -> None:
        super().__init__(sizes)
        self.config, self.mlp = config, mlp

    def forward(self, features: Tensor, budget: int | None = None) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, budget, D]``."""
        tokens = self.config.tokens if budget is None else budget
        return pooled(self.maps(self.mlp(features)), self.config._cells(self.sizes.grid, tokens))
