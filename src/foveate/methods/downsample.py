"""A smaller image: what a service can do without any pruning method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.budget import resolve
from foveate.reducer import Reducer, Stage, register
from foveate.selection import Selection, SpanSelection
from foveate.tokens import Span, VisualTokens


@register("downsample")
@dataclass(frozen=True)
class Downsample(Reducer):
    """Shrink the image before the encoder, so that fewer patches come out of it.

    Each crop is resized (bicubic, antialiased) to the largest grid of patches near its own shape that fits the
    budget, and encoded with interpolated position embeddings: 32 tokens of a square image make a 5 x 6 grid of 30.

    Parameters
    ----------
    keep
        The budget, an upper limit here.
    """

    stage: Stage = "pixels"  # type: ignore[misc]

    def plan(self, span: Span) -> list[tuple[tuple[int, int], Tensor]]:
        """Return, for each crop, the smaller grid and the positions in the span that its tokens stand for."""
        if resolve(self.keep, span.kind, span.ordinal).per == "joint":
            raise InputError("downsample resizes each crop by itself: use a budget per 'image' or per 'crop'")
        plans = []
        for crop, count in zip(span.crops, span.budget(self.keep), strict=True):
            assert crop.grid is not None
            grid = smaller_grid(crop.grid, count)
            rows, columns = (_middles(n, size) for n, size in zip(grid, crop.grid, strict=True))
            plans.append((grid, crop.index[(rows[:, None] * crop.grid[1] + columns).flatten()]))
        return plans

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(
            tuple(
                SpanSelection(len(s), torch.cat([a for _, a in self.plan(s)]).sort().values, sample=s.sample, kind=s.kind)
                for s in tokens.spans
            )
        )


def smaller_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Return the grid of at most `count` patches that has the most of them, among those close to the shape of `grid`.

    A grid is close if its aspect ratio is within a factor of 1.5 of the original; a single row or column otherwise.
    """
    height, width = grid
    if count >= height * width:
        return grid
    best = (1, min(count, width))
    for h in range(1, min(height, count) + 1):
        w = min(width, count // h)
        shape = (h * width) / (w * height)
        if 1 / 1.5 <= shape <= 1.5 and h * w >= best[0] * best[1] * (1 if _close(best, grid) else 0):
            best = (h, w) if not _close(best, grid) or h * w > best[0] * best[1] or _nearer((h, w), best, grid) else best
    return best


def _close(shape: tuple[int, int], grid: tuple[int, int]) -> bool:
    return 1 / 1.5 <= (shape[0] * grid[1]) / (shape[1] * grid[0]) <= 1.5


def _nearer(a: tuple[int, int], b: tuple[int, int], grid: tuple[int, int]) -> bool:
    def skew(shape: tuple[int, int]) -> float:
        ratio = (shape[0] * grid[1]) / (shape[1] * grid[0])
        return max(ratio, 1 / ratio)

    return a[0] * a[1] == b[0] * b[1] and skew(a) < skew(b)


def _middles(parts: int, size: int) -> Tensor:
    return (2 * torch.arange(parts) + 1) * size // (2 * parts)
