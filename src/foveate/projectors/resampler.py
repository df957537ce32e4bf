"""Resamplers: learned queries that attend to all patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.projectors.base import Compressor, Grid, Projector, Sizes, register_projector


@register_projector("resampler")
@dataclass(frozen=True)
class Resampler(Projector):
    """Honeybee's resampler (arXiv 2312.06742): layers of cross-attention and a gated feed-forward network.

    Parameters
    ----------
    tokens
        M, any number.
    depth, hidden, heads, dropout
        Layers; their channels, of which the feed-forward network has four times as many; attention heads; dropout of
        the attention's weights.
    """

    tokens: int = 64
    depth: int = 6
    hidden: int = 1024
    heads: int = 16
    dropout: float = 0.1

    paper = "arXiv:2312.06742"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.depth < 1 or self.hidden % self.heads:
            raise InputError(
                "resampler has tokens and depth from 1 on and channels that its heads divide: not "
                f"tokens={self.tokens}, depth={self.depth}, hidden={self.hidden}, heads={self.heads}"
            )

    def cells(self, grid: Grid) -> None:
        return None

    def num_output_tokens(self, grid: Grid, tiles: int = 1, budget: int | None = None) -> int:
        if budget is not None:
            raise InputError(f"{self.name} gives the tokens that its configuration says: not {budget}")
        return tiles * self.tokens

    def layers(self, depth: int) -> tuple[int, ...]:
        return (depth,)

    def build(self, sizes: Sizes) -> Compressor:
        return Resampled(sizes, self)


class Resampled(Compressor):
    """Queries of zeros at first, which the layers fill from the features."""

    def __init__(self, sizes: Sizes, config: Resampler) -> None:
        super().__init__(sizes)
        self.visual_input_fc = nn.Linear(sizes.features, config.hidden)
        self.queries = nn.Parameter(torch.zeros(1, config.tokens, config.hidden))
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.depth))
        self.visual_output_fc = nn.Linear(config.hidden, sizes.width)

    @property
    def output(self) -> nn.Linear:
        return self.visual_output_fc

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, M, D]``."""
        self.maps(features)  # refuses other grids
        rows, queries = self.visual_input_fc(features), self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, rows)
        tokens: Tensor = self.visual_output_fc(queries)
        return tokens


class ResamplerLayer(nn.Module):
    """Cross-attention to queries and features together, added to the *normalised* queries; then a gated network."""

    def __init__(self, config: Resampler) -> None:
        super().__init__()
        hidden, wide = config.hidden, 4 * config.hidden
        self.norm_q, self.norm_kv = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn = nn.MultiheadAttention(hidden, config.heads, dropout=config.dropout, batch_first=True)
        self.w1, self.w3, self.w2 = nn.Linear(hidden, wide), nn.Linear(hidden, wide), nn.Linear(wide, hidden)
        self.norm_ffn, self.norm_inner = nn.LayerNorm(hidden), nn.LayerNorm(wide)

    def forward(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Map queries ``[B, M, K]`` and rows ``[B, N, K]`` to queries."""
        queries = self.norm_q(queries)
        known = torch.cat([queries, self.norm_kv(rows)], dim=1)
        queries = queries + self.attn(queries, known, known, need_weights=False)[0]
        normed = self.norm_ffn(queries)
        result: Tensor = queries + self.w2(self.norm_inner(nn.functional.silu(self.w1(normed)) * self.w3(normed)))
        return result
