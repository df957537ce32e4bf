"""Reducers that act inside the vision encoder, layer by layer, and the tokens that they act on there."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.core.crops import CropBatch, Groups
from foveate.core.probes import Members, Probe
from foveate.core.ranking import top
from foveate.core.reducer import Reducer, Stage
from foveate.core.selection import Selection
from foveate.core.tokens import VisualTokens


@dataclass(frozen=True, eq=False)
class Inside:
    """Patches of stacked crops on their way through an encoder, n tokens by now.

    Attributes
    ----------
    member
        ``[B, N]`` int64: the token that each of the N patches of a crop is part of, -1 for dropped ones.
    sizes
        ``[B, n]`` float32: the number of patches in each token.
    planes
        What the method reads of the layer, ``[B, n, ...]`` each.
    memory
        ``[B, n]``: what the method noted down in the layer before, carried along with the tokens.
    lead
        Tokens in front of the patches that no method touches: ``[CLS]``, and patches that show padding.
    """

    member: Tensor
    sizes: Tensor
    planes: dict[Probe, Tensor]
    memory: Tensor | None = None
    lead: int = 0

    @classmethod
    def start(cls, batch: int, size: int, lead: int, device: torch.device) -> Inside:
        """Return the state before the first layer: every patch is a token."""
        member = torch.arange(size, device=device).expand(batch, -1)
        return cls(member, torch.ones(batch, size, device=device), {}, None, lead)

    @property
    def places(self) -> Tensor:
        """The first patch of each token, ``[B, n]``."""
        size = self.member.shape[1]
        patch = torch.arange(size, device=self.member.device).expand_as(self.member)
        member = torch.where(self.member < 0, self.sizes.shape[1], self.member)
        out = torch.full((len(member), self.sizes.shape[1] + 1), size, device=member.device)
        return out.scatter_reduce(1, member, patch, "amin")[:, :-1]

    @property
    def homes(self) -> Tensor:
        """The first patch of the token that each patch is part of, ``[B, N]``; -1 for dropped ones."""
        return torch.where(self.member < 0, -1, self.places.gather(1, self.member.clamp(min=0)))

    def step(self, reducer: EncoderReducer, x: Tensor, count: int) -> tuple[Inside, Tensor]:
        """Let the method act on a layer's hidden states ``[B, lead + n, C]``, so that `count` tokens are left."""
        with torch.no_grad():
            into, memory = reducer.step(self, count)
            member = torch.where(self.member < 0, -1, into.gather(1, self.member.clamp(min=0)))
            if memory is not None:
                memory = merged(memory[..., None], into, self.sizes, count)[0][..., 0]
        patches, sizes = merged(x[:, self.lead :], into, self.sizes, count)
        return Inside(member, sizes, {}, memory, self.lead), torch.cat([x[:, : self.lead], patches], dim=1)


def merged(x: Tensor, into: Tensor, sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Average tokens ``[B, n, C]`` into `count` new ones, weighted by their sizes ``[B, n]``; returns both anew.

    Tokens with an `into` of -1 are lost.
    """
    index = torch.where(into < 0, count, into)
    total = torch.zeros(len(x), count + 1, device=x.device).scatter_add(1, index, sizes)
    weighted = x.float() * (sizes / total.gather(1, index))[..., None]
    out = torch.zeros(len(x), count + 1, x.shape[2], device=x.device)
    out = out.scatter_add(1, index[..., None].expand_as(weighted), weighted)
    return out[:, :count].to(x.dtype), total[:, :count]


@dataclass(frozen=True)
class EncoderReducer(Reducer):
    """A method that acts inside the vision encoder, so that later layers have fewer tokens, too.

    Its author declares in `needs` what it reads of every layer, and in which half of a layer it acts, and writes
    `schedule` and `step`. Crops are reduced one by one; budgets are per image or per crop.
    """

    stage: ClassVar[Stage] = "encoder"
    after: ClassVar[Literal["attention", "mlp"]] = "mlp"
    """The half of a layer behind which `step` acts."""

    @property
    def weighs_sizes(self) -> bool:
        """Whether a token of several patches gets as much attention as these would: the logarithm of its size more."""
        return False

    @property
    def alone(self) -> bool:
        """Whether crops run one by one, as how many tokens a layer leaves depends on the picture."""
        return False

    @abstractmethod
    def schedule(self, size: int, count: int, layers: int) -> list[int]:
        """Return how many of `size` tokens are left behind each of the layers that run; the last number is `count`.

        Where it depends on the picture, it is the most that each layer may leave.
        """

    def left(self, inside: Inside, count: int, layer: int, layers: int) -> int:
        """Return how many tokens a layer leaves on the way to `count`: as scheduled, unless the picture decides."""
        return self.schedule(inside.member.shape[1], count, layers)[layer]

    @abstractmethod
    def step(self, inside: Inside, count: int) -> tuple[Tensor, Tensor | None]:
        """Decide in one layer what the n tokens turn into.

        Parameters
        ----------
        inside
            The tokens and what was read.
        count
            The number of new tokens, n or less.

        Returns
        -------
        tuple
            ``[B, n]`` int64: the new token that each one becomes part of; -1 drops it, and several make a mean weighted
            by size. And ``[B, n]`` values to note down, if any.
        """

    def lengths(self, size: int, count: int, layers: int) -> list[tuple[int, int]]:
        """Return how many tokens attend, and how many pass the second half, in each of the layers that run."""
        left = [size] * layers if count >= size else self.schedule(size, count, layers)
        before = [size, *left[:-1]]
        return list(zip(before, left if self.after == "attention" else before, strict=True))

    def select(self, tokens: VisualTokens) -> Selection:
        """Return what happened inside the encoder."""
        if self.merges is None:
            return tokens.per_crop(self.keep, _first_patches)
        return tokens.per_crop_merge(self.keep, _groups)


def _first_patches(crops: CropBatch, count: int) -> Tensor:
    """Return the patches ``[B, count]`` that stand for a token."""
    own = torch.arange(crops.size, device=crops.device)
    return top((crops.probe(Members()) == own).float(), count)


def _groups(crops: CropBatch, count: int) -> Groups:
    kept, homes = _first_patches(crops, count), crops.probe(Members())
    target = torch.searchsorted(kept, homes)
    ones = torch.ones_like(homes, dtype=torch.float32)
    sizes = torch.zeros_like(kept, dtype=torch.float32).scatter_add(1, target, ones)
    source = torch.arange(crops.size, device=crops.device).expand_as(homes)
    return Groups(kept, target, source, 1 / sizes.gather(1, target))
