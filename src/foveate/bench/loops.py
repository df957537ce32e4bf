"""Methods as their descriptions read, in plain loops: what the library's own forms are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.bench.inputs import random_tokens
from foveate.bench.naive import plain_divprune, plain_selection
from foveate.core.crops import CropBatch
from foveate.core.probes import Attention, Embeddings, Features, Keys, Query
from foveate.core.reducer import Reducer
from foveate.measure.provenance import machine, versions
from foveate.measure.timing import threads as torch_threads
from foveate.methods import SCOPE, CDPruner, DivPrune, MMTok, VisionZip, VisPruner

SIZES = ((24, 24, 64), (48, 60, 320))
"""Rows and columns of a picture's tokens, and how many stay."""


def scope(features: Tensor, saliency: Tensor, count: int) -> Tensor:
    """Return SCOPE's picks of one crop in order; the features are ``[N, C]``, the saliency ``[N]``."""
    unit = normalize(features, dim=-1)
    similarity = unit @ unit.T
    covered, picks = torch.zeros_like(saliency), []
    taken = torch.zeros_like(saliency, dtype=torch.bool)
    for _ in range(count):
        gain = (similarity - covered[:, None]).clamp(min=0).sum(dim=0) * saliency
        pick = gain.masked_fill(taken, -torch.inf).argmax()
        taken[pick] = True
        covered = torch.maximum(covered, similarity[:, pick])
        picks.append(pick)
    return torch.stack(picks)


def mmtok(embeddings: Tensor, features: Tensor, words: Tensor, count: int) -> Tensor:
    """Return MMTok's picks of one crop in order; embeddings ``[N, D]``, features ``[N, C]``, words ``[M, D]``."""
    unit, size = normalize(features, dim=-1), len(features)
    vision = (unit @ unit.T / 0.2).softmax(dim=-1) * (0.5 / size)
    text = (normalize(words, dim=-1) @ normalize(embeddings, dim=-1).T / 0.02).softmax(dim=-1) / len(words)
    matrix = torch.cat([text, vision])
    covered, picks = matrix.new_zeros(len(matrix)), []
    taken = torch.zeros(size, dtype=torch.bool)
    for _ in range(count):
        gain = (matrix - covered[:, None]).clamp(min=0).sum(dim=0)
        pick = gain.masked_fill(taken, -torch.inf).argmax()
        taken[pick] = True
        covered = torch.maximum(covered, matrix[:, pick])
        picks.append(pick)
    return torch.stack(picks)


def cdpruner(embeddings: Tensor, words: Tensor, count: int) -> Tensor:
    """Return CDPruner's picks of one crop in order; embeddings ``[N, D]``, words ``[M, D]``."""
    unit = normalize(embeddings, dim=-1)
    relevance = (unit @ normalize(words, dim=-1).T).mean(dim=1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    left, basis, picks = kernel.diagonal().clone(), kernel.new_zeros(count, len(kernel)), []
    for t in range(count):
        pick = left.argmax()
        row = kernel[pick] - (basis[:t, pick, None] * basis[:t]).sum(dim=0)
        basis[t] = row / left[pick].clamp(min=1e-12).sqrt()
        left = left - basis[t].square()
        left[pick] = -torch.inf
        picks.append(pick)
    return torch.stack(picks)


def visionzip(saliency: Tensor, keys: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return VisionZip's dominant tokens and anchors, and which anchor each token left joins.

    Saliency ``[N]``, keys ``[N, d]``; of tokens that are left, in raster order, anchors count as joining themselves.
    """
    chosen = saliency.topk(dominant).indices.sort().values
    is_left = torch.ones_like(saliency, dtype=torch.bool)
    is_left[chosen] = False
    rest = is_left.nonzero().squeeze(1)
    step = max(1, len(rest) // contextual)
    places = torch.arange(0, step * contextual, step)
    metric = normalize(keys[rest], dim=-1)
    group = (metric @ metric[places].T).argmax(dim=-1)
    group[places] = torch.arange(contextual)
    return chosen, rest[places], group


def _arms(grid: tuple[int, int], count: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return for each method its own form and the plain loop, on the same random tokens."""

    def crop(reducer: Reducer) -> CropBatch:
        tokens = random_tokens([*reducer.needs, Query()], grid)
        planes = {probe: torch.stack(tokens.planes[probe]) for probe in reducer.needs if probe in tokens.planes}
        assert tokens.queries is not None
        size = grid[0] * grid[1]
        return CropBatch(grid, (0,), size, torch.device("cpu"), planes, None, torch.stack(tokens.queries))

    one, other = SCOPE(keep=count), MMTok(keep=count)
    third, last = CDPruner(keep=count), VisionZip(keep=count)
    rounds, apart = VisPruner(keep=count), DivPrune(keep=count)
    a, b, c, d, e, f = (crop(reducer) for reducer in (one, other, third, last, rounds, apart))
    assert b.query is not None
    assert c.query is not None
    words, more_words = b.query[0], c.query[0]
    contextual = round(count * last.contextual_ratio)
    return {
        "vispruner": (
            lambda: rounds.pick(e, count),
            lambda: plain_selection(e.probe(Features()), e.probe(Attention()), count),
        ),
        "divprune": (
            lambda: apart.pick(f, count),
            lambda: plain_divprune(f.probe(Embeddings())[0], count),
        ),
        "scope": (
            lambda: one.pick(a, count),
            lambda: scope(a.probe(Features())[0], a.probe(Attention())[0], count),
        ),
        "mmtok": (
            lambda: other.pick(b, count),
            lambda: mmtok(b.probe(Embeddings())[0], b.probe(Features())[0], words, count),
        ),
        "cdpruner": (
            lambda: third.pick(c, count),
            lambda: cdpruner(c.probe(Embeddings())[0], more_words, count),
        ),
        "visionzip": (
            lambda: last.pick(d, count),
            lambda: visionzip(d.probe(Attention())[0], d.probe(Keys())[0], count - contextual, contextual),
        ),
    }


@torch.no_grad()
def against_loops(sizes: Sequence[tuple[int, int, int]] = SIZES, turns: int = 9) -> dict[str, Any]:
    """Time methods and their plain loops in turn, on one thread, after one turn that does not count.

    Returns
    -------
    dict
        Per method and size: milliseconds of both, and the median of the ratios of turns, ours over the loop's. A plain
        loop works in float32, where `CDPruner` works in float64.
    """
    rows = []
    with torch_threads(1):
        about = machine()
        for height, width, count in sizes:
            for name, arms in _arms((height, width), count).items():
                seconds: tuple[list[float], list[float]] = ([], [])
                for turn in range(turns + 1):
                    for arm, times in zip(arms, seconds, strict=True):
                        start = time.process_time()
                        arm()
                        if turn:
                            times.append(time.process_time() - start)
                ours, plain = (round(1e3 * statistics.median(times), 2) for times in seconds)
                ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
                rows.append(
                    {
                        "method": name, "tokens": height * width, "kept": count,
                        "ours_ms": ours, "plain_ms": plain, "ours_of_plain": round(ratio, 2),
                    }
                )  # fmt: skip
    return {"turns": turns, "clock": "cpu", "machine": about, "versions": versions(), "rows": rows}
