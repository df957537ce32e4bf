"""How long each method takes to select, and VisPruner beside the plain loop of its paper."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.bench.inputs import random_tokens
from foveate.bench.naive import plain_selection
from foveate.core.crops import CropBatch
from foveate.core.probes import Attention, Features
from foveate.core.reducer import Method, Reducer
from foveate.core.tokens import VisualTokens
from foveate.measure.provenance import machine, versions
from foveate.measure.timing import median_p90
from foveate.measure.timing import threads as torch_threads
from foveate.methods import VisPruner

GRIDS = ((24, 24), (32, 32), (48, 60))
BATCHES = (1, 8)
REFERENCE = "vispruner"
FRAMES = 8
Say = Callable[[str], None]


@torch.no_grad()
def selection(
    reducers: Sequence[Reducer],
    grids: Sequence[tuple[int, int]] = GRIDS,
    batches: Sequence[int] = BATCHES,
    repeats: int = 7,
    threads: int = 1,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Time the selection of methods on random tokens, all methods in turn, with probes already read.

    Parameters
    ----------
    reducers
        What to time; one of them is VisPruner. Methods of the stages ``"pixels"`` (`downsample`: a smaller picture) and
        ``"encoder"`` (`flowcut`, `tome`: between layers of the vision tower, on what these compute) decide nothing on
        tokens that are there already, so they have no time of their own and are left out by name.
    grids
        Rows and columns of the tokens of a picture. Methods for video get them cut into frames.
    batches
        Pictures at once.
    repeats
        Timed runs per method, after one untimed; fewer for runs of over a second.
    threads
        Of torch.

    Returns
    -------
    dict
        Median and 90th percentile in milliseconds, and the ratio to VisPruner's median at the same size.
    """
    timed = [r for r in reducers if r.stage == "before_llm"]
    rows: list[dict[str, Any]] = []
    with torch_threads(threads):
        for grid in grids:
            for batch in batches:
                say(f"{grid[0] * grid[1]} tokens, {batch} at once")
                found = _times(timed, grid, batch, repeats)
                reference = statistics.median(found[REFERENCE])
                rows += [_row(r, grid, batch, found[r.name], reference) for r in timed]
        about = machine()
        plain = against_plain(say=say)
    return {
        "config": {"repeats": repeats, "frames": FRAMES, "dtype": "float32"},
        "machine": about,
        "versions": versions(),
        "left_out": {r.name: f"stage {r.stage}" for r in reducers if r not in timed},
        "rows": rows,
        "vispruner_against_plain_loop": plain,
    }


def _times(reducers: Sequence[Reducer], grid: tuple[int, int], batch: int, repeats: int) -> dict[str, list[float]]:
    # The tokens of one method at a time are in memory: the large ones take hundreds of megabytes.
    found: dict[str, list[float]] = {}
    reference = next(r for r in reducers if r.name == REFERENCE)
    ordered = [reference, *(r for r in reducers if r is not reference)]
    for reducer in ordered:
        tokens = _tokens(reducer, grid, batch)
        first = _time(reducer, tokens)
        count = repeats if first < 1 else max(1, repeats // 3)
        found[reducer.name] = [_time(reducer, tokens) for _ in range(count)]
    return found


def _tokens(reducer: Reducer, grid: tuple[int, int], batch: int) -> VisualTokens:
    if reducer.video_only:
        return random_tokens(reducer.needs, (grid[0] // FRAMES, grid[1]), batch, FRAMES)
    return random_tokens(reducer.needs, grid, batch)


def _time(reducer: Reducer, tokens: VisualTokens) -> float:
    start = time.perf_counter()
    reducer.select(tokens)
    return time.perf_counter() - start


def _row(
    reducer: Method, grid: tuple[int, int], batch: int, seconds: Sequence[float], reference: float
) -> dict[str, Any]:
    return {
        "method": reducer.name,
        "reducer": repr(reducer),
        "tokens": grid[0] * grid[1],
        "grid": list(grid),
        "batch": batch,
        **median_p90(seconds),
        "runs": len(seconds),
        "of_vispruner": round(statistics.median(seconds) / reference, 2),
    }


@torch.no_grad()
def against_plain(inputs: int = 200, repeats: int = 40, say: Say = lambda _: None) -> dict[str, Any]:
    """Compare VisPruner's selection with the plain loop: the same indices, and how much faster.

    The inputs have features of +1 and -1, so that every cosine is exact in float32 whatever order it is summed in, and
    many are equal: rounding cannot hide a difference, and ties are decided. Sizes are even and odd, and a third of the
    inputs is float16. The time is that of 576 tokens of width 1,024, of which 64 stay.
    """
    say("VisPruner against the plain loop")
    generator = torch.Generator().manual_seed(0)
    same = 0
    for i in range(inputs):
        size = int(torch.randint(40, 577, (), generator=generator))
        count = int(torch.randint(2, min(size, 129), (), generator=generator))
        features, saliency = exact_tokens(size, 256, generator)
        if i % 3 == 0:
            features, saliency = features.half(), saliency.half()
        chosen = _pick(features, saliency, count)
        same += bool(torch.equal(chosen, plain_selection(features, saliency, count)))
    features, saliency = exact_tokens(576, 1024, generator)
    arms: tuple[Callable[[], Tensor], ...] = (
        lambda: _pick(features, saliency, 64),
        lambda: plain_selection(features, saliency, 64),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for arm, times in zip(arms, seconds, strict=True):
            start = time.perf_counter()
            arm()
            if turn >= 2:
                times.append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    ours, plain = (statistics.median(times) for times in seconds)
    return {
        "tokens": 576,
        "width": 1024,
        "kept": 64,
        "batch": 1,
        "identical": same,
        "inputs": inputs,
        "vispruner_ms": round(1e3 * ours, 3),
        "plain_ms": round(1e3 * plain, 3),
        "ratio_of_medians": round(plain / ours, 2),
        "median_of_ratios": round(statistics.median(ratios), 2),
        "ratio_of_fastest": round(min(seconds[1]) / min(seconds[0]), 2),
        "turns": repeats,
    }


def exact_tokens(size: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features ``[1, size, width]`` of +1 and -1 around a few centres, and saliency ``[1, size]`` with ties."""
    centres = torch.randint(2, (24, width), generator=generator)
    own = centres[torch.randint(24, (size,), generator=generator)]
    flips = torch.rand(size, width, generator=generator) < 0.2
    signs = 2.0 * (own ^ flips) - 1.0
    saliency = torch.randint(size, (size,), generator=generator) / size
    return signs[None], saliency[None]


def _pick(features: Tensor, saliency: Tensor, count: int) -> Tensor:
    planes: dict[Any, Tensor] = {Features(): features, Attention(): saliency}
    crops = CropBatch(None, (0,) * len(features), features.shape[1], features.device, planes)
    return VisPruner(keep=count).pick(crops, count).sort().values
