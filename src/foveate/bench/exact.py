"""What exact arithmetic costs: selection in float64 beside the same in float32, where rounding decides what is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from foveate.bench.inputs import random_tokens
from foveate.core import ranking
from foveate.core.crops import CropBatch
from foveate.core.probes import Embeddings
from foveate.core.reducer import Reducer
from foveate.core.selection import Selection
from foveate.core.tokens import VisualTokens
from foveate.measure.timing import threads
from foveate.methods import GPrune, VisPruner

SIZES = (((24, 24), 64), ((48, 60), 320))
"""Rows and columns of the tokens of a picture, and how many of them stay."""


@torch.no_grad()
def cost(method: Reducer, repeats: int = 9) -> list[dict[str, Any]]:
    """Time a method of `IN_FLOAT32` and its form in float32, in turn, by the processor time of one thread.

    Returns
    -------
    list
        For each of `SIZES` both medians in milliseconds, their ratio, and the share of tokens that both keep.
    """
    rows = []
    with threads(1):
        for grid, keep in SIZES:
            sized: Reducer = replace(method, keep=keep)
            arms = (sized.select, lambda tokens, own=sized: IN_FLOAT32[own.name](own, tokens))
            tokens = random_tokens(sized.needs, grid)
            kept = [set(arm(tokens)[0].kept.tolist()) for arm in arms]  # untimed, as first runs are slow
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(repeats):
                for arm, times in zip(arms, seconds, strict=True):
                    start = time.process_time()
                    arm(tokens)
                    times.append(time.process_time() - start)
            exact, plain = map(statistics.median, seconds)
            row = {"method": sized.name, "tokens": grid[0] * grid[1], "keep": keep}
            row |= {"float64_ms": round(1e3 * exact, 1), "float32_ms": round(1e3 * plain, 1)}
            rows.append({**row, "ratio": round(exact / plain, 2), "same": round(len(kept[0] & kept[1]) / keep, 4)})
    return rows


def vispruner(method: VisPruner, tokens: VisualTokens) -> Selection:
    """Select as VisPruner does, from cosines in float32."""
    with float32_cosines():
        return method.select(tokens)


def gprune(method: GPrune, tokens: VisualTokens) -> Selection:
    """Select as G-Prune does, from cosines and sums in float32."""

    def pick(crops: CropBatch, count: int) -> Tensor:
        embeddings = crops.probe(Embeddings())
        similarity = ranking.cosine_matrix(embeddings)
        edges = similarity >= method.threshold
        flow = torch.where(edges, similarity / method.temperature, -5000.0).softmax(dim=-1)
        information: Tensor = torch.linalg.vector_norm(embeddings, dim=-1)[:, None]
        for _ in range(method.steps):
            information = torch.bmm(information, flow)
        return ranking.top(information.squeeze(1) / edges.sum(dim=-1).clamp(min=1), count)

    return tokens.per_crop(method.keep, pick)


IN_FLOAT32: Final[dict[str, Callable[[Any, VisualTokens], Selection]]] = {"vispruner": vispruner, "gprune": gprune}


@contextmanager
def float32_cosines() -> Iterator[None]:
    """Let whoever asks for cosines in float64 have those of float32, in the whole process."""
    exact = ranking.cosine_matrix
    ranking.cosine_matrix = lambda *args, dtype=None, **kwargs: exact(*args, **kwargs)
    try:
        yield
    finally:
        ranking.cosine_matrix = exact
