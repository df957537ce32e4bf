"""QueCC: local cross-attention whose queries know the question, for very few tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.projectors.base import (
    Compressor,
    Grid,
    Mlp,
    Projector,
    Sizes,
    divided,
    heads_of,
    register_projector,
    several_layers,
)
from foveate.projectors.tokenpacker import attend_regions


@register_projector("quecc")
@dataclass(frozen=True)
class QueCC(Projector):
    """Query-based convolutional cross-attention (arXiv 2411.03312, ICLR 2025), made for 1 to 16 tokens.

    The LLM's own state of the question, after its last norm at the last token of a pass over the text alone, is added
    to every patch; a strided depth-wise convolution makes the queries; keys and values come from four layers.

    Parameters
    ----------
    kernel
        Patches along a side of the region that becomes one token: 24 of 24 make one token of a picture.
    heads
        Of the attention; `None` for 128 channels each.
    multi_layers
        See `TokenPacker`.
    """

    kernel: int = 4
    heads: int | None = None
    multi_layers: tuple[int, ...] | None = None

    paper = "arXiv:2411.03312"
    query_aware = True

    def cells(self, grid: Grid) -> Grid:
        return divided(self.name, grid, self.kernel)

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.multi_layers or several_layers(depth)

    def build(self, sizes: Sizes) -> Compressor:
        return QueryConvolution(sizes, self)


class QueryConvolution(Compressor):
    """The module, with the release's names of parameters; `mlp` is LLaVA's projector behind it."""

    def __init__(self, sizes: Sizes, config: QueCC) -> None:
        super().__init__(sizes)
        self.cells = config.cells(sizes.grid)
        features = sizes.features
        wide = len(config.multi_layers or several_layers(24)) * features
        self.text_projection = nn.Sequential(nn.Linear(sizes.width, features), nn.LayerNorm(features, eps=1e-6))
        self.q_proj, self.k_proj, self.v_proj = (_normed(size, features) for size in (features, wide, wide))
        self.q_downsample = nn.Conv2d(features, features, config.kernel, config.kernel, groups=features)
        self.clip_attn = nn.MultiheadAttention(features, config.heads or heads_of(features), batch_first=True)
        self.mlp = Mlp(features, sizes.width)

    @property
    def output(self) -> nn.Linear:
        return self.mlp.output

    def forward(self, features: Tensor, question: Tensor | None = None) -> Tensor:
        """Map ``[B, N, L C]`` and the LLM's states of the questions ``[B, D]`` to ``[B, M, D]``.

        Raises
        ------
        InputError
            If there is no question.
        """
        if question is None:
            raise InputError("quecc reads the question: hand over the LLM's state of it, one [D] per picture")
        last = features[..., -self.sizes.features :] + self.text_projection(question)[:, None]
        query = self.q_downsample(self.maps(self.q_proj(last))).flatten(2).transpose(1, 2)
        key, value = self.k_proj(features), self.v_proj(features)
        tokens: Tensor = self.mlp(attend_regions(self.clip_attn, query, key, value, self.sizes.grid, self.cells))
        return tokens


def _normed(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(*Mlp(features, width), nn.LayerNorm(width, eps=1e-6))
