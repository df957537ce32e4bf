"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, register


@register("random")
@dataclass(frozen=True)
class Random(CropReducer):
    """Keep tokens drawn at random, the same ones for the same seed.

    Parameters
    ----------
    keep
        The budget.
    seed
        Seed of the draw. A crop's draw depends on it, on the number of tokens, and on which crop of its prompt it is,
        but not on the batch that the prompt travels in: average several seeds.
    """

    seed: int = 0

    complexity = "O(N)"

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        draws = [_draw(self.seed * 1_000_003 + ordinal, crops.size)[:count] for ordinal in crops.ordinals]
        return torch.stack(draws).to(crops.device, non_blocking=True)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _draw(seed: int, size: int) -> Tensor:
    """Return the numbers below `size` in random order."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
