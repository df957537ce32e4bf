"""Honeybee's C-Abstractor: convolutions before and behind an average pool."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.projectors.base import (
    Compressor,
    Grid,
    Mlp,
    Projector,
    Sizes,
    as_maps,
    pooled,
    register_projector,
    square,
)


@register_projector("c_abstractor")
@dataclass(frozen=True)
class CAbstractor(Projector):
    """C-Abstractor of Honeybee (arXiv 2312.06742, CVPR 2024).

    Parameters
    ----------
    tokens
        M, a square; where its side does not divide that of the grid, the pooled cells overlap.
    depth
        Convolution blocks before the pool, and as many behind it; 0: pooling and two linear layers.
    hidden
        Channels of the blocks.
    """

    tokens: int = 144
    depth: int = 3
    hidden: int = 1024

    paper = "arXiv:2312.06742"

    def __post_init__(self) -> None:
        if self.depth < 0 or self.hidden < 4:
            raise InputError(f"c_abstractor has depth from 0 and hidden from 4 on: not {self.depth} and {self.hidden}")

    def cells(self, grid: Grid) -> Grid:
        return square(self.name, self.tokens, grid)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (depth,)

    def build(self, sizes: Sizes) -> Compressor:
        return Abstractor(sizes, self)


class Abstractor(Compressor):
    """Positions, blocks, pool, blocks, two linear layers with a SiLU between.

    Positions are added to a copy of the features; Honeybee's code adds them in place, and so spoils them for others.
    """

    def __init__(self, sizes: Sizes, config: CAbstractor) -> None:
        super().__init__(sizes)
        self.cells = config.cells(sizes.grid)
        self.pos_emb = nn.Parameter(torch.empty(1, sizes.patches, sizes.features))
        nn.init.trunc_normal_(self.pos_emb, std=0.02)
        widths = [sizes.features, *[config.hidden] * config.depth]
        self.before = nn.Sequential(*(Bottleneck(a, b) for a, b in itertools.pairwise(widths)))
        self.behind = nn.Sequential(*(Bottleneck(config.hidden, config.hidden) for _ in range(config.depth)))
        self.readout = Mlp(widths[-1], sizes.width, nn.SiLU)

    @property
    def output(self) -> nn.Linear:
        return self.readout.output

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, M, D]``."""
        maps = self.maps(features)
        maps = self.before(maps + as_maps(self.pos_emb, self.sizes.grid))
        maps = self.behind(as_maps(pooled(maps, self.cells), self.cells))
        tokens: Tensor = self.readout(maps.flatten(2).transpose(1, 2))
        return tokens


class Bottleneck(nn.Module):
    """A RegNet block with a depth-wise convolution and squeeze-and-excitation, of maps ``[B, K, H, W]``."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 1, bias=False), ChannelNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm2 = ChannelNorm(width)
        # The ratio of squeeze-and-excitation is one of the block's input.
        self.squeeze, self.excite = nn.Conv2d(width, channels // 4, 1), nn.Conv2d(channels // 4, width, 1)
        self.conv3, self.norm3 = nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width)
        self.shortcut: nn.Module = nn.Identity()
        if channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), ChannelNorm(width))
        self.act = nn.SiLU()

    def gate(self, maps: Tensor) -> Tensor:
        """Return by how much each channel counts, ``[B, K, 1, 1]`` from 0 to 1."""
        return torch.sigmoid(self.excite(self.act(self.squeeze(maps.mean(dim=(2, 3), keepdim=True)))))

    def forward(self, maps: Tensor) -> Tensor:
        """Run the block."""
        found = self.act(self.norm1(self.conv1(maps)))
        found = self.act(self.norm2(self.conv2(found)))
        found = self.norm3(self.conv3(found * self.gate(found)))
        result: Tensor = self.act(found + self.shortcut(maps))
        return result


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps ``[B, K, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5)

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)
