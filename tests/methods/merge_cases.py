"""Inputs that are the same everywhere for methods that merge, and what comes out of a merge."""

import math

import torch
from greedy_cases import cosines

from foveate.core.crops import CropBatch


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
    return cosines([x], [y])[0][0]
