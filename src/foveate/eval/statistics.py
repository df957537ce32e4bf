"""Figures of an evaluation and how sure they are: whole images are drawn and swapped, as one image's questions hang
together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Counts: TypeAlias = NDArray[Any]
RESAMPLES: Final = 2000
FLIPS: Final = 10_000


def relative_average(right: Counts, unpruned: Counts) -> dict[str, float]:
    """Mean over the kinds of questions of 100 times the accuracy divided by that of the unpruned model.

    Parameters
    ----------
    right, unpruned
        Right answers per image and kind to the same questions, ``[images, kinds]``.

    Returns
    -------
    dict of float
        ``average`` in percent, and its ``error``: the standard deviation over bootstrap samples of the images, the
        same for both.
    """
    asked = unpruned.sum(axis=0) > 0
    right, unpruned = right[:, asked], unpruned[:, asked]
    images = len(right)
    weights = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), RESAMPLES)
    with np.errstate(invalid="ignore"):  # a small sample may lack a kind, which then does not count in it
        sampled = 100 * np.nanmean(weights @ right / (weights @ unpruned), axis=1)
    average = 100 * (right.sum(axis=0) / unpruned.sum(axis=0)).mean()
    return {"average": round(float(average), 2), "error": round(float(sampled.std(ddof=1)), 2)}


def sign_flip(differences: Counts) -> float:
    """Return the two-sided p-value of a paired permutation test: each image's difference may as well be its negative.

    Parameters
    ----------
    differences
        Right answers of one method minus those of another, per image, ``[images]``.
    """
    signs = np.random.default_rng(0).integers(0, 2, (FLIPS, len(differences))) * 2 - 1
    extreme = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9
    return float((1 + extreme.sum()) / (1 + FLIPS))


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm's step-down), in the same order."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(np.argsort(values, kind="stable")):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = highest
    return adjusted
