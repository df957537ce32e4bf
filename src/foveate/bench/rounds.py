"""What larger rounds change in VisPruner."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from foveate.bench.inputs import random_tokens
from foveate.core.probes import Features
from foveate.methods import VisPruner
from foveate.methods.vispruner import PUBLISHED_STEP


@torch.no_grad()
def larger_rounds(side: int = 48, seeds: int = 4) -> dict[str, Any]:
    """Hold VisPruner's rounds of 8 tokens, in which N of more than 1,024 tokens would take long, against its default.

    Parameters
    ----------
    side
        Rows, and columns, of pictures of random tokens, of which a ninth stays.
    seeds
        Pictures.

    Returns
    -------
    dict
        Shares of the kept tokens that both keep; beside them those that rounds of 8 keep if the features change by a
        share of 1e-7; and means over the kept tokens of their cosine with all others, and with the closest one.
    """
    default, published = (VisPruner(keep=1 / 9, step=step) for step in ("auto", PUBLISHED_STEP))
    shared: list[float] = []
    noise: list[float] = []
    cosines: dict[str, list[tuple[float, float]]] = {"auto": [], "8": []}
    for seed in range(seeds):
        tokens = random_tokens(default.needs, (side, side), seed=seed)
        (features,) = tokens.planes[Features()]
        larger, small = (method.select(tokens)[0].kept for method in (default, published))
        shared.append(_shared(larger, small))
        cosines["auto"].append(_cosines(features[larger]))
        cosines["8"].append(_cosines(features[small]))
        generator = torch.Generator().manual_seed(seed)
        tokens.planes[Features()][0] = features * (1 + 1e-7 * torch.randn(features.shape, generator=generator))
        noise.append(_shared(published.select(tokens)[0].kept, small))
    means = {step: [round(statistics.mean(values), 4) for values in zip(*found, strict=True)]
             for step, found in cosines.items()}  # fmt: skip
    return {
        "tokens": side * side,
        "pictures": seeds,
        "step": default.per_round(side * side, len(small)),
        "kept_by_both": round(statistics.mean(shared), 3),
        "kept_by_8_with_noise": round(statistics.mean(noise), 3),
        "mean_cosine": {step: mean for step, (mean, _) in means.items()},
        "mean_closest_cosine": {step: closest for step, (_, closest) in means.items()},
    }


def _shared(one: Tensor, other: Tensor) -> float:
    return float(torch.isin(one, other).double().mean())


def _cosines(kept: Tensor) -> tuple[float, float]:
    unit = torch.nn.functional.normalize(kept.double(), dim=-1)
    apart = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)].view(len(unit), -1)
    return float(apart.mean()), float(apart.amax(dim=1).mean())
