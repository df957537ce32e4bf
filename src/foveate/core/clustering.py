"""Density-peak clustering: centres are dense points far from denser ones."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.errors import InputError

_ROWS = 1024


def dpc_knn(points: Tensor, clusters: int, neighbours: int = 5, *, itself: bool = False) -> tuple[Tensor, Tensor]:
    """Cluster points around their density peaks.

    The centres are the points with the highest product of density and gap, see `density_peaks`; every point belongs to
    the closest centre. Ties go to the lower index.

    Parameters
    ----------
    points
        ``[M, D]``.
    clusters
        Number of clusters, at most M.
    neighbours, itself
        See `density_peaks`.

    Returns
    -------
    tuple
        Cluster of each point ``[M]``, and the centres ``[clusters]``, both int64.
    """
    size = len(points)
    if not 1 <= clusters <= size:
        raise InputError(f"{size} points make 1 to {size} clusters, not {clusters}")
    if size == 1:
        return (torch.zeros(1, dtype=torch.long, device=points.device),) * 2
    x = points.double() / points.shape[1] ** 0.5
    density, gap = density_peaks(points, neighbours, itself=itself)
    centres = (density * gap).argsort(descending=True, stable=True)[:clusters]
    labels = torch.cat([torch.cdist(part, x[centres]).argmin(dim=1) for part in torch.split(x, _ROWS)])
    labels[centres] = torch.arange(clusters, device=x.device)
    return labels, centres


def density_peaks(points: Tensor, neighbours: int, *, itself: bool = False) -> tuple[Tensor, Tensor]:
    """Return how dense the surroundings of each point are, and how far it is to a denser one, both ``[M]`` float64.

    The density of a point is ``exp(-mean(d^2))`` over its nearest neighbours, with distances ``d`` divided by the root
    of the width; of equal densities the first is the highest. The gap is the distance to the closest denser point; of
    the densest one, the largest distance of all.

    Parameters
    ----------
    points
        ``[M, D]``, at least two.
    neighbours
        Number of nearest neighbours, without the point itself.
    itself
        Whether the point itself, at distance zero, counts in the mean.
    """
    x, size = points.double() / points.shape[1] ** 0.5, len(points)
    nearest, furthest = [], []
    for start in range(0, size, _ROWS):
        distances = torch.cdist(x[start : start + _ROWS], x)
        furthest.append(distances.amax())
        rows = torch.arange(len(distances), device=x.device)
        distances[rows, rows + start] = torch.inf
        closest = distances.topk(min(neighbours, size - 1), largest=False).values
        nearest.append(closest.square().sum(dim=1) / (closest.shape[1] + itself))
    density = -torch.cat(nearest)
    order = density.argsort(descending=True, stable=True)
    x_ranked, gaps = x[order], []
    for start in range(0, size, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, size), device=x.device)
        distances = torch.cdist(x_ranked[rows], x_ranked[: start + _ROWS])
        denser = torch.arange(distances.shape[1], device=x.device) < rows[:, None]
        gaps.append(distances.masked_fill(~denser, torch.inf).amin(dim=1))
    gap = torch.empty_like(density).index_copy(0, order, torch.cat(gaps))
    return density.exp(), torch.where(gap.isinf(), torch.stack(furthest).amax(), gap)
