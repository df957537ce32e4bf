"""WiCo: the last vision layer tuned so that a window's patches grow alike, then put side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from foveate.projectors.base import Compressor, Grid, Projector, Sizes, divided, regions, register_projector


@register_projector("wico")
@dataclass(frozen=True)
class WiCo(Projector):
    """Window token concatenation (arXiv 2504.04024, CVPR Workshops 2025).

    Parameters
    ----------
    window
        Patches along a side of the window that becomes one token.
    tuned
        Whether a trainable copy of the vision encoder's last layer runs in front, on patches without ``[CLS]``. Not in
        a module that starts at the average of the stock projector's tokens.
    skip
        As released, read the features of one layer earlier, so that the copy skips a layer. Off: the copy continues
        where the features are, as the paper's figure has it.

    Notes
    -----
    Deviation: windows divide the grid; the authors' sizes go wrong where they do not. Their unused `patch_proj` is
    left out.
    """

    window: int = 2
    tuned: bool = True
    skip: bool = False

    paper = "arXiv:2504.04024"
    adds_features = False

    def cells(self, grid: Grid) -> Grid:
        return divided(self.name, grid, self.window)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (depth - 2 if self.skip else depth - 1,)

    def retrofit(
        self, sizes: Sizes, stock: nn.Module, stock_layers: Sequence[int], branch_layers: Sequence[int]
    ) -> Compressor:
        return ConcatenatedTokens(sizes, self.cells(sizes.grid), stock)

    def build_beside(self, sizes: Sizes, encoder: nn.ModuleList) -> Compressor:
        module = Windows(sizes, self)
        if self.tuned:
            module.self_att.append(copy.deepcopy(encoder[-1]))
        return module

    def build(self, sizes: Sizes) -> Compressor:
        return Windows(sizes, self)


class Windows(Compressor):
    """A layer of the vision encoder, if `self_att` holds one, and a linear layer over the patches of each window.

    Concatenated channels lie in the order channel, row, column, as the authors'; pixel shuffle has another.
    """

    def __init__(self, sizes: Sizes, config: WiCo) -> None:
        super().__init__(sizes)
        self.cells = config.cells(sizes.grid)
        self.self_att = nn.ModuleList()
        self.window_proj = nn.Linear(config.window**2 * sizes.features, sizes.width)

    def windows(self, features: Tensor) -> Tensor:
        """Return ``[B, M, window² C]`` of features ``[B, N, C]``."""
        self.maps(features)  # refuses other grids
        return regions(features, self.sizes.grid, self.cells).transpose(2, 3).flatten(2)

    @property
    def output(self) -> nn.Linear:
        return self.window_proj

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, M, D]``."""
        for layer in self.self_att:
            found = layer(features, attention_mask=None)
            features = found[0] if isinstance(found, tuple) else found
        tokens: Tensor = self.window_proj(self.windows(features))
        return tokens


class ConcatenatedTokens(Compressor):
    """WiCo's retrofit: the tokens of the stock projector side by side, a linear layer that starts as their mean.

    Parameters
    ----------
    sizes, cells
        See `foveate.projectors.base.Retrofit`.
    stock
        The model's own projector.
    """

    def __init__(self, sizes: Sizes, cells: Grid, stock: nn.Module) -> None:
        super().__init__(sizes)
        self.cells, self.stock = cells, stock
        count = sizes.patches // (cells[0] * cells[1])
        self.window_proj = nn.Linear(count * sizes.width, sizes.width)
        nn.init.zeros_(self.window_proj.bias)
        nn.init.zeros_(self.window_proj.weight)
        with_mean = self.window_proj.weight.data.view(sizes.width, count, sizes.width)
        with_mean.diagonal(dim1=0, dim2=2).fill_(1 / count)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, M, D]``."""
        tokens: Tensor = self.window_proj(regions(self.stock(features), self.sizes.grid, self.cells).flatten(2))
        return tokens
