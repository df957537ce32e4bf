"""G-Prune: tokens that collect the most information on a graph of similar tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register

_NO_EDGE = -5000.0  # finite, so that a zero vector, which has no edge at all, gives no NaN
_AT_ONCE = 2**20  # entries of the flow that are in memory a second time, or in float64


@register("gprune")
@dataclass(frozen=True)
class GPrune(CropReducer):
    """G-Prune (arXiv 2501.02268, AAAI 2025): tokens that represent their neighbours on a similarity graph.

    Tokens are joined where the cosine of their embeddings ``[N, D]`` reaches a threshold. Information, at first the L2
    norm of each token, flows along the edges for a few steps; what a token has then, divided by the number of its
    neighbours (itself included), is its score. Reads neither attention nor the question.

    Parameters
    ----------
    keep
        The budget T. The published default is a ratio of 0.5.
    threshold
        Least cosine of an edge, in (0, 1).
    temperature
        Divisor of the cosines in the softmax that divides what flows out of a token.
    steps
        Steps of the flow, at least 1.

    Notes
    -----
    Costs ``O(N^2 D)`` for the cosines and ``O(steps * N^2)`` for the flow, which multiplies a vector by the matrix of
    the flow, in place of powers of that matrix.

    Deviations from the paper: of tile sets, each crop is a graph; the official code joins all tiles but the thumbnail
    in a single one, which on them alone a joint budget does. Newline vectors are left to the engine; the official code
    keeps all of them. Neighbours are counted by the threshold, as the official code does in float32 but not in float16.
    A zero vector has no edges and scores 0. A ratio rounds half to even, as everywhere here, where the official code
    truncates. Ties go to the lower index. Tokens keep their original positions.
    """

    threshold: float = 0.5
    temperature: float = 0.03
    steps: int = 5

    needs = (probes.Embeddings(),)
    paper = "arXiv:2501.02268"
    complexity = "O(N^2 D + steps N^2)"
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.threshold < 1.0:
            raise FoveateError(f"threshold is a cosine between 0 and 1, not {self.threshold}")
        if not 0.0 < self.temperature < float("inf"):
            raise FoveateError(f"temperature is a finite number above 0, not {self.temperature}")
        if self.steps < 1:
            raise FoveateError(f"information flows for at least one step, not steps={self.steps}")

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        return ranking.top(self._score(crops.probe(probes.Embeddings())), count)

    def _score(self, embeddings: Tensor) -> Tensor:
        """Return the information per neighbour ``[B, N]`` of tokens ``[B, N, D]``."""
        flow = ranking.cosine_matrix(embeddings, dtype=torch.float64, rounded=torch.float32)
        neighbours, few = [], max(1, _AT_ONCE // flow.shape[2])
        for start in range(0, flow.shape[1], few):
            rows = flow[:, start : start + few]
            edges = rows >= self.threshold
            neighbours.append(edges.sum(dim=-1))
            rows.copy_(torch.where(edges, rows / self.temperature, _NO_EDGE).softmax(dim=-1))
        information: Tensor = torch.linalg.vector_norm(embeddings, dim=-1, dtype=torch.float64)[:, None]
        for _ in range(self.steps):
            parts = [slice(start, start + few) for start in range(0, flow.shape[1], few)]
            flowing = [torch.bmm(information[:, :, part], flow[:, part].double()) for part in parts]
            information = torch.stack(flowing).sum(dim=0)
        # Sums in float64 and scores in float32: copies, whose sums differ in the last bit, score the same.
        return (information.squeeze(1) / torch.cat(neighbours, dim=1).clamp(min=1)).float()
