"""Inputs that are the same everywhere, and how picks of the methods are compared with those of a plain loop."""

import math
import operator

import torch

from foveate.core.crops import CropBatch


def wave(n, c, s, p):
    return [[math.sin(s * (i + 1) * (j + 1)) + 0.3 * math.cos(p * (i + 1) + (j + 1)) for j in range(c)]
            for i in range(n)]  # fmt: skip


def wave_saliency(n):
    total = [0.0] * n
    for h in range(4):
        row = [math.exp(2 * math.sin(2.3 * j + 0.5 * h)) for j in range(n + 1)]
        for i in range(n):
            total[i] += row[i + 1] / math.fsum(row) / 4
    return total


S64, SALIENCY64 = wave(64, 8, 0.8, 1.3), wave_saliency(64)
S16, SALIENCY16 = wave(16, 8, 0.8, 1.3), wave_saliency(16)
RING_DEGREES = (0, 7, 40, 90, 96, 133, 180, 191, 222, 270, 283, 318)
RING12 = [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in RING_DEGREES]
RING_SALIENCY = [0.10, 0.02, 0.03, 0.16, 0.04, 0.05, 0.14, 0.07, 0.01, 0.12, 0.06, 0.20]


def text(m):
    return wave(m, 8, 1.1, 0.7)


def unit(x):
    norm = math.sqrt(math.fsum(a * a for a in x))
    return [a / norm for a in x] if norm else list(x)


def cosines(xs, ys):
    ys = [unit(y) for y in ys]
    return [[math.fsum(map(operator.mul, x, y)) for y in ys] for x in map(unit, xs)]


def choose(scores):
    """Return the index of the highest of ``{index: score}``, the lowest of equal ones, and how far the next is behind.

    Scores within 1e-12 of the best are equal to it; the distance is relative to the best.
    """
    best = max(scores.values())
    equal = [i for i, s in scores.items() if best - s <= 1e-12 * max(1.0, abs(best))]
    behind = [s for i, s in scores.items() if i not in equal]
    return min(equal), (best - max(behind)) / max(abs(best), 1e-12) if behind else math.inf


def agreement(got, picks, gaps, clear=1e-4):
    """Compare picks up to the first decision that float32 may take differently; return the share that was compared."""
    sure = next((t for t, gap in enumerate(gaps) if gap < clear), len(gaps))
    assert len(got) == len(picks) == len(set(got))
    assert got[:sure] == picks[:sure]
    return sure / len(picks)


def crop_batch(planes, query=None):
    """Stack planes that are lists or tensors ``[B, N, ...]``; `query` is ``[B, M, D]``."""
    planes = {probe: torch.as_tensor(x) for probe, x in planes.items()}
    batch, size = next(iter(planes.values())).shape[:2]
    query = None if query is None else torch.as_tensor(query)
    return CropBatch(None, tuple(range(batch)), size, torch.device("cpu"), planes, None, query)


def order(reducer, planes, count, query=None):
    """Return what a method picks from one crop, in its own order; planes are ``[N, ...]``, the query ``[M, D]``."""
    one = {probe: torch.as_tensor(x)[None] for probe, x in planes.items()}
    return reducer.pick(crop_batch(one, None if query is None else torch.as_tensor(query)[None]), count)[0].tolist()


def exact_features(n, generator):
    """Make vectors of 4 entries of 1 or -1 among 8: their cosines are exact in float32, and many are equal."""
    places = torch.rand(n, 8, generator=generator).argsort(dim=1)[:, :4]
    signs = torch.randint(0, 2, (n, 4), generator=generator) * 2.0 - 1
    return torch.zeros(n, 8).scatter(1, places, signs)


def cases(number, seed, smallest=2, largest=40):
    """Yield sizes and budgets, T from 1 to N - 1, each with a generator; every second case is in half precision."""
    generator = torch.Generator().manual_seed(seed)
    for case in range(number):
        n = int(torch.randint(smallest, largest, (), generator=generator))
        count = int(torch.randint(1, n, (), generator=generator))
        yield n, count, (torch.float16 if case % 2 else torch.float32), generator
