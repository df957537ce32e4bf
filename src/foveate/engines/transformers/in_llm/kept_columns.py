"""What a layer of an LLM still has behind boundaries at which tokens were dropped: in its cache, and in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.errors import InputError
from foveate.engines.transformers.compaction import repeats, sources, spread


@dataclass(frozen=True, eq=False)
class KeptColumns:
    """Which columns a layer keeps in its KV cache: those of the first layer behind each of its own.

    Attributes
    ----------
    columns
        ``[B, W]`` int64, -1 at padding.
    length
        Columns of the first layer when these were listed; it has got further ones since, which all layers keep.
    padded
        Whether any of the columns is -1.
    """

    columns: Tensor
    length: int
    padded: bool

    def until(self, length: int) -> Tensor:
        """Return the columns when the first layer has so many."""
        if length == self.length:
            return self.columns
        if length < self.length:  # cropped by a negative number: each layer lost as many columns
            kept = self.columns[:, : length - self.length]
            if bool((self.columns[:, kept.shape[1] :] < length).any()):
                raise InputError("this cache was cropped to where an image is: start with a new cache")
            return kept
        further = torch.arange(self.length, length, device=self.columns.device)
        return torch.cat([self.columns, further.expand(len(self.columns), -1)], dim=1)

    def expanded(self, batch: int) -> KeptColumns:
        """Return the same for a batch in which each prompt stands several times in a row."""
        times = repeats(len(self.columns), batch)
        if times == 1:
            return self
        return KeptColumns(self.columns.repeat_interleave(times, dim=0), self.length, self.padded)


@dataclass(frozen=True, eq=False)
class RemainingTokens:
    """The tokens of a pass, text included, that remain in a layer: R per prompt.

    Attributes
    ----------
    index
        ``[B, R]`` int64: columns of the pass, -1 at padding.
    lengths
        Per prompt the number of those that are no padding.
    visual
        Per prompt with visual tokens the places of the free ones among the R.
    origin
        Per prompt with visual tokens which of those that the LLM was given they are.
    """

    index: Tensor
    lengths: list[int]
    visual: list[Tensor]
    origin: list[Tensor]

    @property
    def width(self) -> int:
        """Number of tokens per prompt, R."""
        return int(self.index.shape[1])

    @property
    def padded(self) -> bool:
        """Whether any of the R is padding."""
        return any(n < self.width for n in self.lengths)

    def gather(self, x: Tensor) -> Tensor:
        """Take these tokens out of ``[..., B or 1, q, C]``."""
        index = self.index.clamp(min=0).to(x.device)
        # Rotary embeddings of a batch without padding have one row for all prompts.
        batch = torch.zeros_like(index) if x.shape[-3] == 1 else torch.arange(len(index), device=x.device)[:, None]
        return x[..., batch, index, :]

    def spread(self, x: Tensor, width: int) -> Tensor:
        """Put the tokens ``[B, R, C]`` back where they were among `width`, see `sources`."""
        return spread(x, sources(self.index, width))
