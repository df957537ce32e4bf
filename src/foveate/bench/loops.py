"""Methods beside the plain loops of their papers, and what larger rounds change in VisPruner."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.bench.inputs import EMBEDDING, WIDTH, random_tokens
from foveate.bench.naive import plain_divprune, plain_selection
from foveate.bench.selection import exact_tokens
from foveate.core.crops import CropBatch
from foveate.core.probes import Attention, Embeddings, Features, Probe
from foveate.core.reducer import CropReducer
from foveate.methods import DivPrune, VisPruner
from foveate.methods.vispruner import PUBLISHED_STEP

SIZES = ((576, 64), (2880, 320))


@torch.no_grad()
def against_loops(sizes: Sequence[tuple[int, int]] = SIZES, turns: int = 7) -> list[dict[str, Any]]:
    """Time methods and the plain loops in turn, by processor time of one thread; both have to keep the same tokens.

    Parameters
    ----------
    sizes
        Tokens, and how many of them stay.
    turns
        Runs of each.

    Returns
    -------
    list
        Per method and size the medians in milliseconds, the median of the ratios of ours to the loop's time, and
        whether both keep the same tokens: of exact cosines, so that rounding cannot hide a difference.
    """
    rows = []
    for size, count in sizes:
        features, saliency = exact_tokens(size, WIDTH, torch.Generator().manual_seed(size))
        embeddings, _ = exact_tokens(size, EMBEDDING, torch.Generator().manual_seed(size))
        same_step = VisPruner(keep=count, step=PUBLISHED_STEP)

        def vispruner_loop(features: Tensor = features, saliency: Tensor = saliency, count: int = count) -> Tensor:
            return plain_selection(features, saliency, count)[0]

        def divprune_loop(embeddings: Tensor = embeddings, count: int = count) -> Tensor:
            return plain_divprune(embeddings[0], count)

        seen: dict[Probe, Tensor] = {Features(): features, Attention(): saliency}
        rows += [
            _row(same_step, seen, count, vispruner_loop, turns),
            _row(VisPruner(keep=count), seen, count, vispruner_loop, turns),
            _row(DivPrune(keep=count), {Embeddings(): embeddings}, count, divprune_loop, turns),
        ]
    return rows


def _row(
    method: CropReducer, planes: dict[Probe, Tensor], count: int, loop: Callable[[], Tensor], turns: int
) -> dict[str, Any]:
    size = next(iter(planes.values())).shape[1]
    crops = CropBatch(None, (0,), size, torch.device("cpu"), planes)
    arms: tuple[Callable[[], Tensor], ...] = (lambda: method.pick(crops, count)[0].sort().values, loop)
    same = torch.equal(*[arm() for arm in arms])
    seconds = [[_time(arm) for arm in arms] for _ in range(turns)]
    ours, plain = zip(*seconds, strict=True)
    return {
        "method": method.name,
        "reducer": repr(method),
        "tokens": size,
        "kept": count,
        "ours_ms": round(1e3 * statistics.median(ours), 3),
        "plain_ms": round(1e3 * statistics.median(plain), 3),
        "ours_of_plain": round(statistics.median(a / b for a, b in seconds), 3),
        "same": same,
    }


def _time(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


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
