"""Random visual tokens of any size, with every probe that a method asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.core.codebook import Codebook
from foveate.core.probes import ClsSimilarity, ClsToken, Embeddings, Features, Heads, LayerProbe, Probe, Query
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens

# CLIP-L/336 before a 7B language model.
HEADS, HEAD_SIZE, DEPTH, READ = 16, 64, 24, 22
WIDTH, EMBEDDING, WORDS = HEADS * HEAD_SIZE, 4096, 16
PROTOTYPES = 454


def random_tokens(
    probes: Sequence[Probe], grid: tuple[int, int], batch: int = 1, frames: int = 0, seed: int = 0
) -> VisualTokens:
    """Make the tokens of `batch` prompts with one picture each, shaped as LLaVA-1.5-7B has them.

    Parameters
    ----------
    probes
        What to fill in; probes of attention layers read random queries, keys and values.
    grid
        Rows and columns of a picture, or of each frame.
    frames
        Frames of a video; with 0 the span is a picture.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n, parts = grid[0] * grid[1], max(frames, 1)
    crops = tuple(Crop(torch.arange(i * n, (i + 1) * n), grid, encoder_row=i) for i in range(parts))
    kind = "video" if frames else "image"
    spans = tuple(Span(kind, i, 0, torch.arange(parts * n), (parts, *grid), crops) for i in range(batch))
    # Tokens gather around a few centres, as the patches of pictures do.
    centres = normal(32, EMBEDDING)
    planes: dict[Probe, list[Tensor]] = {}
    for probe in probes:
        if isinstance(probe, Features | Embeddings):
            width = WIDTH if isinstance(probe, Features) else EMBEDDING
            groups = [torch.randint(len(centres), (n,), generator=generator) for _ in range(batch * parts)]
            planes[probe] = [centres[group, :width] + 0.7 * normal(n, width) for group in groups]
        elif isinstance(probe, ClsSimilarity):
            planes[probe] = [torch.rand(n, generator=generator) for _ in range(batch * parts)]
        elif isinstance(probe, LayerProbe):
            planes[probe] = [_layer_values(probe, normal(3, 1, HEADS, 1 + n, HEAD_SIZE)) for _ in range(batch * parts)]
    queries = tuple(normal(WORDS, EMBEDDING) for _ in range(batch)) if Query() in probes else None
    return VisualTokens(spans, planes, torch.device("cpu"), cls=ClsToken() in probes, queries=queries)


def random_codebook(seed: int = 0) -> Codebook:
    """Make a codebook of as many prototypes as the published one of LLaVA-1.5-7B has."""
    prototypes = torch.randn(PROTOTYPES, EMBEDDING, generator=torch.Generator().manual_seed(seed))
    return Codebook(prototypes, "none: random prototypes", "")


def _layer_values(probe: LayerProbe, heads: Tensor) -> Tensor:
    query, key, value = heads
    values = probe.read(Heads(query, key, value, HEAD_SIZE**-0.5, lead=1))[0]
    if not probe.stacked:
        return values
    return torch.stack([values.roll(i, 0) for i in range(len(probe.numbers(DEPTH, READ)))], dim=-1)
