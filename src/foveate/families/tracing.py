"""Where the outputs of a tower's layers go: found by following gradients back, with no word from the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.errors import InputError

_LEVELS = 8
"""Factors 1, 2, 4 ..., one per digit of a row's number: powers of two, as scaling by them rounds nothing."""
_NOISE = 1e-2
"""How far a gradient may be from the scaled one that a single row would have sent, as a share of it."""


@dataclass(frozen=True, eq=False)
class Flow:
    """Which row each position flows into.

    Attributes
    ----------
    row
        ``[P]`` int64 on the CPU: the number of the row, -1 for a position that flows into none.
    mixes
        Whether some position flows into several rows; `row` means nothing then.
    """

    row: Tensor
    mixes: bool


def flow(rows: Tensor, sources: Sequence[Tensor]) -> Flow:
    """Follow rows back to the positions that they are made of.

    Each row sends back a random vector of its own; then the same once more for each digit of the rows' numbers, times a
    factor that tells the digit. A position that flows into a single row gets the first gradient times that row's
    factor, whatever lies between; one that flows into several gets something else.

    Parameters
    ----------
    rows
        ``[M, D]``, computed from the sources with gradients.
    sources
        ``[..., C]`` each, positions counted through all of them.

    Raises
    ------
    InputError
        If gradients are not finite.
    """
    generator = torch.Generator(rows.device).manual_seed(0)
    sent = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=torch.float32).to(rows.dtype)
    plain = _gradients(rows, sources, sent)
    if not bool(plain.isfinite().all()):
        raise InputError("the vision encoder or its projector makes values of these images that are not finite")
    size = plain.square().sum(dim=-1)
    found, mixes = torch.zeros(len(plain), dtype=torch.int64, device=plain.device), False
    number, step = torch.arange(len(rows), device=rows.device), 1
    for _ in range(math.ceil(math.log(max(len(rows), 2), _LEVELS) - 1e-9)):
        factor = 2.0 ** (number // step % _LEVELS)
        scaled = _gradients(rows, sources, sent * factor[:, None].to(sent.dtype))
        ratio = (scaled * plain).sum(dim=-1) / size
        digit = ratio.clamp(min=1).log2().round().nan_to_num().long().clamp(max=_LEVELS - 1)
        rest = (scaled - 2.0 ** digit[:, None] * plain).square().sum(dim=-1)
        mixes |= bool((rest > _NOISE**2 * scaled.square().sum(dim=-1)).any())
        found += digit * step
        step *= _LEVELS
    return Flow(torch.where(size > 0, found, -1).cpu(), mixes)


def _gradients(rows: Tensor, sources: Sequence[Tensor], sent: Tensor) -> Tensor:
    """Return what comes back to the positions of all sources, ``[P, C]`` float64; zero where nothing does."""
    back = torch.autograd.grad(rows, list(sources), sent, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([x.flatten(0, -2) for x in back]).double()


def touched(rows: Tensor, sources: Sequence[Tensor]) -> list[bool]:
    """Return whether rows ``[M, D]`` are computed from a source, for each."""
    back = torch.autograd.grad(rows, list(sources), torch.ones_like(rows), retain_graph=True, allow_unused=True)
    return [x is not None and bool(x.any()) for x in back]
