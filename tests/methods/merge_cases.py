"""Inputs that are the same everywhere for methods that merge, and what comes out of a merge."""

import math

import torch

from foveate.tokens import CropBatch


def wave(n, c, s, p):
    return [[math.sin(s * (i + 1) * (j + 1)) + 0.3 * math.cos(p * (i + 1) + (j + 1)) for j in range(c)]
            for i in range(n)]  # fmt: skip


def wave_attention(n):
    total = [0.0] * n
    for h in range(4):
        row = [math.exp(2 * math.sin(2.3 * j + 0.5 * h)) for j in range(n + 1)]
        for i in range(n):
            total[i] += row[i + 1] / math.fsum(row) / 4
    return total


def wave_keys(n, heads, d):
    """Keys per head, ``[n][heads][d]``."""
    return [[[math.sin(0.9 * (i + 1) * (c + 1) + 0.4 * h) for c in range(d)] for h in range(heads)] for i in range(n)]


def mean_keys(n, heads, d):
    return torch.tensor(wave_keys(n, heads, d), dtype=torch.float64).mean(dim=1).tolist()


def crop_batch(planes, grid=None, cls=False):
    """Stack one crop's planes ``[N, ...]`` to a batch of one, or take those of several ``[B, N, ...]``."""
    planes = {probe: torch.as_tensor(x) for probe, x in planes.items()}
    batch, size = next(iter(planes.values())).shape[:2]
    return CropBatch(grid, tuple(range(batch)), size, torch.device("cpu"), planes, size if cls else None)


def one(planes):
    return {probe: torch.as_tensor(x)[None] for probe, x in planes.items()}


def applied(groups, x, crop=0):
    """Return the places of a crop's merged tokens, ascending, and the tokens made of the rows of `x` in that order."""
    places, target, source, weight = groups.per_crop()[crop]
    assert len(set(places.tolist())) == len(places)
    out = torch.zeros(len(places), x.shape[-1], dtype=torch.float64)
    out.index_add_(0, target, x[source].double() * weight[:, None].double())
    order = places.argsort()
    return places[order].tolist(), out[order]


def cosine(x, y):
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    norm = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
    return dot / norm if norm else 0.0


def exact_vectors(n, generator):
    """Make vectors of 4 entries of 1 or -1 among 8: their cosines are exact in float32, and many are equal."""
    places = torch.rand(n, 8, generator=generator).argsort(dim=1)[:, :4]
    signs = torch.randint(0, 2, (n, 4), generator=generator) * 2.0 - 1
    return torch.zeros(n, 8).scatter(1, places, signs)
