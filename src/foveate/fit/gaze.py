"""Calibration of Gaze: the gain at which it stops, so that it keeps a mean number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from foveate.core.crops import CropBatch
from foveate.core.errors import InputError
from foveate.engines.pipeline import look
from foveate.engines.settings import Settings
from foveate.engines.transformers.reduce import base_model
from foveate.families import family_of
from foveate.methods.gaze import Gaze

MOST: Final = 4
"""How many times the mean a crop may keep."""


@dataclass(frozen=True)
class Stop:
    """What was found.

    Attributes
    ----------
    reducer
        The method, with its `tau`.
    mean
        Tokens per crop that it keeps of the prompts.
    counts
        Of each crop.
    """

    reducer: Gaze
    mean: float
    counts: tuple[int, ...]


@torch.no_grad()
def calibrate(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    tokens: int,
    method: type[Gaze] = Gaze,
    done: Callable[[], None] = lambda: None,
) -> Stop:
    """Find the `tau` with which Gaze keeps so many tokens of a crop on average, and at most `MOST` times as many.

    Parameters
    ----------
    model
        A `transformers` model.
    prompts
        Model inputs of one prompt each, as its processor returns them; about 100 with pictures of the kind that it is
        for.
    tokens
        The mean.
    method
        `Gaze`, or `GazeQuery`.
    done
        Called after each prompt.

    Raises
    ------
    InputError
        If the mean is out of range, or no crop of the prompts has more than the most tokens.
    """
    model, most = base_model(model), MOST * tokens
    reducer = method(keep=most)
    if tokens < reducer.least:
        raise InputError(
            f"gaze keeps at least {reducer.least} tokens of a crop: ask for a mean of so many, not {tokens}"
        )
    family = family_of(model)
    Settings.make(reducer, family=family)
    gains: list[Tensor] = []

    def pick(crops: CropBatch, count: int) -> Tensor:
        picks = reducer.pick(crops, count)
        gains.extend(reducer.falling(crops, picks).cpu())
        return picks

    for inputs in prompts:
        seen = look(model, family, inputs, family.spans(model, inputs), [reducer])
        seen.per_crop(most, pick)
        done()
    if not gains:
        raise InputError(f"no crop of these prompts has more than {most} tokens, {MOST} times the mean")

    def counts(tau: float) -> list[int]:
        return [max(reducer.least, 1 + int((row >= tau).sum())) for row in gains]

    # The mean falls with tau, in steps at the gains: bisect among these.
    steps = torch.unique(torch.cat(gains))
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(counts(float(steps[middle]))) / len(gains) > tokens:
            low = middle + 1
        else:
            high = middle
    own = counts(float(steps[low]))
    return Stop(replace(reducer, tau=float(steps[low])), sum(own) / len(own), tuple(own))
