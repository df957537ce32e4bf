"""How well-conditioned each method is: what it keeps when rounding, but nothing else, differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.bench import exact
from foveate.bench.inputs import random_tokens
from foveate.core.checks import selected
from foveate.core.probes import Embeddings, Features, Keys
from foveate.core.reducer import Reducer
from foveate.core.selection import SpanSelection
from foveate.core.tokens import VisualTokens
from foveate.measure.provenance import machine, versions
from foveate.measure.timing import threads

GRID, FRAMES, NOISE, THREADS = (24, 24), 8, 1e-7, (1, 2)
Change = Callable[[Tensor], Tensor]
Say = Callable[[str], None]


@torch.no_grad()
def conditioning(reducers: Sequence[Reducer], seeds: int = 8, say: Say = lambda _: None) -> dict[str, Any]:
    """Let methods decide on features, and again on the same features with other rounding.

    Compared are channels in another order, which changes no cosine; noise of 1e-7 of each value; torch with another
    number of threads; and pictures in one batch with each by itself. What a method makes of each token counts: kept,
    dropped, or merged into which other one.

    Returns
    -------
    dict
        For each method and change the share of decisions that are the same, and how many of the pictures are the same
        altogether; of methods that need float64 for that, also what it costs.
    """
    timed = [r for r in reducers if r.stage == "before_llm"]
    rows = []
    for reducer in timed:
        say(reducer.name)
        rows.append({"method": reducer.name, "reducer": repr(reducer), **_agreement(reducer, seeds)})
    costs = []
    for reducer in (r for r in timed if r.name in exact.IN_FLOAT32):
        say(f"{reducer.name} in float32")
        costs += exact.cost(reducer)
    config = {"tokens": GRID[0] * GRID[1], "frames": FRAMES, "seeds": seeds, "noise": NOISE, "threads": list(THREADS)}
    return {
        "config": {**config, "dtype": "float32"},
        "machine": machine(),
        "versions": versions(),
        "left_out": {r.name: f"stage {r.stage}" for r in reducers if r not in timed},
        "rows": rows,
        "exact_arithmetic_cost": costs,
    }


def _agreement(reducer: Reducer, seeds: int) -> dict[str, Any]:
    grid, frames = ((GRID[0] // FRAMES, GRID[1]), FRAMES) if reducer.video_only else (GRID, 0)
    found: dict[str, list[float]] = {"channels": [], "noise": [], "threads": [], "batch": []}
    with threads(THREADS[0]):
        for seed in range(seeds):
            tokens = random_tokens(reducer.needs, grid, 1, frames, seed)
            due = fates(reducer, tokens)
            found["channels"].append(same(due, fates(reducer, changed(tokens, permutation(seed)))))
            found["noise"].append(same(due, fates(reducer, changed(tokens, noise(seed)))))
            with threads(THREADS[1]):
                found["threads"].append(same(due, fates(reducer, tokens)))
            found["batch"].append(same(due, fates(reducer, twice(tokens))))
    return {
        change: {"same": round(sum(shares) / seeds, 4), "pictures_same": sum(share == 1 for share in shares)}
        for change, shares in found.items()
    }


def fates(reducer: Reducer, tokens: VisualTokens) -> set[tuple[int, int]]:
    """Let a method decide, and return which token went into which, of the first span."""
    return flows(selected(reducer, tokens)[0])


def flows(chosen: SpanSelection) -> set[tuple[int, int]]:
    """Return which token of a span went into which kept one."""
    if chosen.merge is None:
        return {(i, i) for i in chosen.kept.tolist()}
    return set(zip(chosen.kept[chosen.merge.target].tolist(), chosen.merge.source.tolist(), strict=True))


def same(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> float:
    """Return the share of decisions that are the same."""
    return len(a & b) / max(len(a), len(b)) if a or b else 1.0


def changed(tokens: VisualTokens, change: Change) -> VisualTokens:
    """Change features, embeddings, keys and queries."""
    planes = {
        probe: [change(x) if isinstance(probe, Features | Embeddings | Keys) else x for x in plane]
        for probe, plane in tokens.planes.items()
    }
    queries = None if tokens.queries is None else tuple(map(change, tokens.queries))
    return replace(tokens, planes=planes, queries=queries)


def permutation(seed: int) -> Change:
    """Put channels in another order, which changes cosines by rounding alone."""
    # The same for all of one width, as the query has the channels of the embeddings.
    return lambda x: x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))]


def noise(seed: int) -> Change:
    """Change each value by as much as rounding may."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: x * (1 + NOISE * torch.randn(x.shape, generator=generator, dtype=torch.float64)).float()


def twice(tokens: VisualTokens) -> VisualTokens:
    """Put the picture into a batch with one like it, backwards."""
    (span,) = tokens.spans
    planes = {probe: [*plane, *(x.flip(0) for x in plane)] for probe, plane in tokens.planes.items()}
    queries = None if tokens.queries is None else tokens.queries * 2
    return replace(tokens, spans=(span, replace(span, sample=1)), planes=planes, queries=queries)
