"""MQT: learned queries of which any first few can be used."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from foveate.core.errors import InputError
from foveate.projectors.base import Compressor, Grid, Projector, Sizes, as_maps, register_projector, trunc_normal


@register_projector("mqt")
@dataclass(frozen=True)
class Mqt(Projector):
    """Matryoshka Query Transformer (arXiv 2405.19315, NeurIPS 2024): one cross-attention whose queries are nested.

    The first m tokens are the same whatever number is asked for, so one model answers at every budget. In training draw
    m anew for each step, an even number from 2 on, with `sampled`.

    Parameters
    ----------
    queries
        How many there are, a square.
    tokens
        How many are used where a call names no budget; `None` for all.
    heads
        Of the attention.
    content_keys
        Let keys hold the patches beside their places. As released, keys are places alone, so that every picture is
        mixed by the same weights; with content the attention sees the picture (UNVERIFIED quality).
    """

    queries: int = 256
    tokens: int | None = None
    heads: int = 16
    content_keys: bool = False

    paper = "arXiv:2405.19315"

    def __post_init__(self) -> None:
        if self.queries < 1 or math.isqrt(self.queries) ** 2 != self.queries:
            raise InputError(f"mqt has a square number of queries, not {self.queries}")
        self._checked(self.tokens)

    def cells(self, grid: Grid) -> None:
        return None

    def num_output_tokens(self, grid: Grid, tiles: int = 1, budget: int | None = None) -> int:
        return tiles * self._checked(self.tokens if budget is None else budget)

    def _checked(self, tokens: int | None) -> int:
        if tokens is not None and not 1 <= tokens <= self.queries:
            raise InputError(f"mqt has {self.queries} queries, of which 1 to {self.queries} are used: not {tokens}")
        return self.queries if tokens is None else tokens

    def sampled(self, generator: torch.Generator) -> int:
        """Draw a number of tokens for a step of training: even, from 2 to all."""
        return 2 * int(torch.randint(1, self.queries // 2 + 1, (), generator=generator))

    def build(self, sizes: Sizes) -> Compressor:
        return NestedQueries(sizes, self)


class NestedQueries(Compressor):
    """The module; its parameters have the names of the released checkpoint."""

    def __init__(self, sizes: Sizes, config: Mqt) -> None:
        super().__init__(sizes)
        self.config = config
        features, side = sizes.features, math.isqrt(config.queries)
        self.query = nn.Parameter(torch.empty(config.queries, features))
        self.pos_embed = nn.Parameter(places((side, side), features), requires_grad=False)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(features, eps=1e-6) for _ in range(3))
        self.attn = nn.MultiheadAttention(features, config.heads, batch_first=True)
        self.proj = nn.Parameter(torch.randn(features, sizes.width) * sizes.width**-0.5)
        trunc_normal([self.attn.out_proj])
        nn.init.trunc_normal_(self.query, std=0.02)

    def key_places(self) -> Tensor:
        """Return the table of places, resized to the grid of patches, ``[N, C]``."""
        side = math.isqrt(self.config.queries)
        table = as_maps(self.pos_embed[None].float(), (side, side))
        resized = interpolate(table, size=self.sizes.grid, mode="bicubic", align_corners=False)
        return resized.flatten(2)[0].T.to(self.pos_embed.dtype)

    def forward(self, features: Tensor, budget: int | None = None) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, budget, D]``."""
        self.maps(features)  # refuses other grids
        count = self.config.num_output_tokens(self.sizes.grid, budget=budget)
        query = self.ln_q(self.query[:count] + self.pos_embed[:count])
        key = self.key_places().to(features.dtype)[None]
        key = self.ln_k(features + key if self.config.content_keys else key.expand_as(features))
        found, _ = self.attn(query.expand(len(features), -1, -1), key, self.ln_v(features), need_weights=False)
        tokens: Tensor = found @ self.proj
        return tokens


def places(grid: Grid, channels: int) -> Tensor:
    """Return sines and cosines of the places of a grid, ``[h w, channels]``: one half tells columns, the other rows.

    Raises
    ------
    InputError
        If the channels do not divide by four.
    """
    if channels % 4:
        raise InputError(f"places are told by sines and cosines along two axes: {channels} channels do not divide by 4")
    frequency = 10000.0 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))

    def axis(length: int) -> Tensor:
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    rows, columns = axis(grid[0]), axis(grid[1])
    both = torch.cat([columns.repeat(grid[0], 1), rows.repeat_interleave(grid[1], dim=0)], dim=-1)
    return both.to(torch.get_default_dtype())
