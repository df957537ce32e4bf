"""TokenPacker: queries from a small feature map, detail from the patches below each of them in four layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import interpolate

from foveate.projectors.base import (
    Compressor,
    Grid,
    Mlp,
    Projector,
    Sizes,
    divided,
    heads_of,
    regions,
    register_projector,
    several_layers,
    trunc_normal,
)


@register_projector("tokenpacker")
@dataclass(frozen=True)
class TokenPacker(Projector):
    """TokenPacker (arXiv 2407.02392, IJCV 2025): local cross-attention from coarse queries to fine, multi-level keys.

    Parameters
    ----------
    scale
        Patches along a side of the region that becomes one token.
    heads
        Of the attention; `None` for 128 channels each.
    multi_layers
        Hidden states of the keys and values, 0 being the embeddings, the queries' layer last; `None` for 12, 16, 22, 23
        of 24 layers and the same shares of other encoders (UNVERIFIED there).

    Notes
    -----
    The bilinear resize without antialiasing that makes the queries sees the mean of 2 x 2 patches at scale 2, the
    centre patch alone at 3, and the mean of the central four at 4: replacing it breaks the released checkpoints.
    """

    scale: int = 2
    heads: int | None = None
    multi_layers: tuple[int, ...] | None = None

    paper = "arXiv:2407.02392"

    def cells(self, grid: Grid) -> Grid:
        return divided(self.name, grid, self.scale)

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.multi_layers or several_layers(depth)

    def build(self, sizes: Sizes) -> Compressor:
        return Packer(sizes, self)


class Packer(Compressor):
    """The module; its parameters have the names of the released checkpoints."""

    def __init__(self, sizes: Sizes, config: TokenPacker) -> None:
        super().__init__(sizes)
        self.cells = config.cells(sizes.grid)
        features = sizes.features
        wide = len(config.multi_layers or several_layers(24)) * features
        self.q_proj_1 = nn.Linear(features, features, bias=False)
        self.k_proj_1, self.v_proj_1 = Mlp(wide, features), Mlp(wide, features)
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(features, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(features, config.heads or heads_of(features), batch_first=True)
        self.mlp = Mlp(features, sizes.width)
        trunc_normal(list(self.modules()))

    def coarse(self, features: Tensor) -> Tensor:
        """Resize the last layer of features ``[B, N, L C]`` to the grid of the tokens, ``[B, M, C]``."""
        maps = self.maps(features[..., -self.sizes.features :])
        small = interpolate(maps.float(), size=self.cells, mode="bilinear", align_corners=False)
        return small.to(maps.dtype).flatten(2).transpose(1, 2)

    @property
    def output(self) -> nn.Linear:
        return self.mlp.output

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, L C]`` to ``[B, M, D]``."""
        query = self.ln_q_1(self.q_proj_1(self.coarse(features)))
        key, value = self.ln_k_1(self.k_proj_1(features)), self.ln_v_1(self.v_proj_1(features))
        return self.mlp(attend_regions(self.clip_attn, query, key, value, self.sizes.grid, self.cells))  # type: ignore[no-any-return]


def attend_regions(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, grid: Grid, cells: Grid
) -> Tensor:
    """Let each token's query ``[B, M, C]`` attend to the patches of its region among ``[B, N, C]``; ``[B, M, C]``."""
    key, value = (regions(rows, grid, cells).flatten(0, 1) for rows in (key, value))
    found, _ = attention(query.flatten(0, 1)[:, None], key, value, need_weights=False)
    tokens: Tensor = found.reshape_as(query)
    return tokens
