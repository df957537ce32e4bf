"""Gaze: tokens that differ, spread over the picture, weighted by evidence that saturates; foveate's own method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.author import (
    CropBatch,
    CropReducer,
    FoveateError,
    Selection,
    VisualTokens,
    probes,
    ranking,
    register,
)
from foveate.methods import determinants

_FLOOR = 1e-3  # of the ridge: what rounding may leave of a gain that is at least the ridge


@register("gaze")
@dataclass(frozen=True)
class Gaze(CropReducer):
    """Gaze, foveate's own method: a greedy log-determinant of a centred kernel with a grid prior. Asks no question.

    The first token is the one most like the mean of the picture; it stands for the picture as a whole. The others
    maximise, one by one, ``log det(K + ridge I)`` over those picked plus the sum of ``log w``: the kernel K compares
    tokens ``[N, D]``, as unit vectors from which their mean is taken, so that what all have in common counts for
    nothing, times a Gaussian of their distance on the grid, so that what is far apart is not the same; the weight w is
    the attention s that a token gets in the later two thirds of the vision encoder, as ``s / (s + mean s)``, so that a
    few very salient tokens do not take everything.

    Parameters
    ----------
    keep
        The budget T.
    spread
        Standard deviation of the Gaussian, as a share of the longer side of the grid. Where the grid is not known,
        the kernel goes without.
    ridge
        What the diagonal of the kernel gets on top: how much a token counts that is like picked ones.
    saliency
        Exponent of the weight; 0 for none.
    tau
        Stop where the gains have fallen below: `keep` is then at most, and each crop decides how many tokens it needs.
        For extreme budgets; ``foveate calibrate --method gaze`` finds the one of a mean number. `None` for just `keep`.
    least
        Tokens of a crop that stay at least, with `tau`.

    Notes
    -----
    With `tau`, `select` waits for the device, and compiles to no single graph.

    Without a matrix of all cosines: ``O(T N (D + T))`` time, ``O(N (D + T))`` memory.

    Its ingredients are known: the greedy determinant of CDPruner (arXiv 2506.10967), spatial terms of VLM-Pruner
    (arXiv 2512.02700), importance beside diversity of VisPruner and MMR. `GazeQuery` also reads the question.
    """

    spread: float = 0.25
    ridge: float = 0.1
    saliency: float = 0.5
    tau: float | None = None
    least: int = 4

    needs: ClassVar[tuple[probes.Probe, ...]] = (probes.Embeddings(), probes.Attention(layers=0.34))
    complexity = "O(T N (D + T))"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("spread", self.spread), ("ridge", self.ridge)):
            if not 0.0 < value < float("inf"):
                raise FoveateError(f"{name} is a finite number above 0, not {value}")
        if not 0.0 <= self.saliency < float("inf"):
            raise FoveateError(f"saliency is an exponent from 0 on, not {self.saliency}")
        if self.tau is not None and not 0.0 < self.tau < float("inf"):
            raise FoveateError(f"tau is a finite gain above 0, not {self.tau}")
        if self.least < 1:
            raise FoveateError(f"least is a number of tokens from 1 on, not {self.least}")

    @property
    def adaptive(self) -> bool:
        return self.tau is not None

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        # What was written before these two came says the same as what is written without them.
        return data if self.adaptive else {name: x for name, x in data.items() if name not in ("tau", "least")}

    def select(self, tokens: VisualTokens) -> Selection:
        return tokens.per_crop_at_most(self.keep, self._enough) if self.adaptive else super().select(tokens)

    def _enough(self, crops: CropBatch, count: int) -> tuple[Tensor, Tensor]:
        """Return the picks ``[B, count]`` and how many of them each crop needs ``[B]``."""
        picks = self.pick(crops, count)
        assert self.tau is not None
        needed = 1 + (self.falling(crops, picks) >= self.tau).sum(dim=1)
        return picks, needed.clamp(min=min(self.least, count))

    def falling(self, crops: CropBatch, picks: Tensor) -> Tensor:
        """Return the least gain so far ``[B, T - 1]`` at each of the picks ``[B, T]`` but the first."""
        picks = picks[:, 1:]
        unit = normalize(crops.probe(probes.Embeddings()).float().nan_to_num(), dim=-1)
        centred = (unit - unit.mean(dim=1, keepdim=True)).double()
        variance = centred.square().sum(dim=-1).mean(dim=1).clamp(min=1e-12)
        own = centred.take_along_dim(picks[:, :, None], dim=1)
        kernel = own @ own.transpose(1, 2) / variance[:, None, None]
        if crops.grid is not None:
            kernel = kernel * torch.stack([self._nearness(crops, x[:, None])[:, x] for x in picks])  # type: ignore[index]
        kernel = kernel + self.ridge * torch.eye(picks.shape[1], dtype=kernel.dtype, device=kernel.device)
        gains: Tensor = torch.linalg.cholesky(kernel).diagonal(dim1=1, dim2=2).square()
        return (self._weight(crops).gather(1, picks) * gains).cummin(dim=1)[0]

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        unit = normalize(crops.probe(probes.Embeddings()).float().nan_to_num(), dim=-1)
        mean = unit.mean(dim=1, keepdim=True)
        centred = unit - mean
        squares = centred.square().sum(dim=-1)
        variance = squares.mean(dim=1, keepdim=True).clamp(min=1e-12)
        taken = torch.zeros_like(squares, dtype=torch.bool)
        picks = [ranking.take_best((unit * mean).sum(dim=-1), taken)]
        weight, gain, explained = self._weight(crops), squares / variance + self.ridge, unit[:, :, :0]
        if crops.size >= determinants.FROM and crops.device.type == "cpu" and not torch.compiler.is_compiling():
            each = zip(centred, variance, gain, weight, taken, strict=True)
            rest = [self._of_many(crops, *one, count - 1) for one in each]
            return torch.cat([picks[0], torch.stack(rest)], dim=1)
        while len(picks) < count:
            pick = ranking.take_best(weight * gain, taken)
            picks.append(pick)
            row = _products(centred, pick) / variance * self._nearness(crops, pick)
            row = (row - _products(explained, pick)) / gain.gather(1, pick).sqrt()
            explained = torch.cat([explained, row[:, :, None]], dim=-1)
            gain = (gain - row.square()).clamp(min=self.ridge * _FLOOR)
        return torch.cat(picks, dim=1)

    def _of_many(
        self,
        crops: CropBatch,
        centred: Tensor,
        variance: Tensor,
        gain: Tensor,
        weight: Tensor,
        taken: Tensor,
        count: int,
    ) -> Tensor:
        """Do as `pick` behind the first token, for one crop of many tokens, of which few pairs are compared."""
        floor, own = self.ridge * _FLOOR, weight.double()
        greedy = determinants.LazyDeterminant(
            lambda tokens: centred[tokens],
            gain.double(),
            lambda left, tokens: own[tokens] * left.clamp(min=floor),
            count,
            ranking.RESOLUTION,
            floor,
            lambda picks, tokens: self._nearness(crops, picks[:, None], tokens) / variance,
            taken,
        )
        return greedy.pick()

    def _weight(self, crops: CropBatch) -> Tensor:
        """Return how much evidence there is for each token, ``[B, N]``."""
        layers = crops.probe(self.needs[1]).float().nan_to_num(nan=0.0, posinf=0.0).clamp(min=0)
        attention = layers.mean(dim=-1)
        mean = attention.mean(dim=1, keepdim=True)
        return torch.where(mean > 0, attention / (attention + mean), 1.0) ** self.saliency

    def _nearness(self, crops: CropBatch, pick: Tensor, tokens: Tensor | None = None) -> Tensor | float:
        """Return how near tokens, by default all ``[N]``, are to picked ones ``[B, 1]`` on the grid, from 0 to 1."""
        if crops.grid is None:
            return 1.0
        height, width = crops.grid
        index = torch.arange(crops.size, device=pick.device) if tokens is None else tokens
        distance = (index // width - pick // width).square() + (index % width - pick % width).square()
        return torch.exp(distance / (-2 * (self.spread * max(height, width)) ** 2))


@register("gaze_query")
@dataclass(frozen=True)
class GazeQuery(Gaze):
    """Gaze with the question: the weight of a token is also its likeness to the words.

    That is the mean cosine of its embedding ``[D]`` and the input embeddings of the prompt's text ``[M, D]``, brought
    to 0..1 in each crop. Depends on the question, so nothing can be cached across questions. Where a model's
    embeddings of text and images are not aligned, `Gaze` without the question keeps the better tokens.

    Parameters
    ----------
    keep, spread, ridge, saliency, tau, least
        See `Gaze`.
    """

    needs = (probes.Embeddings(), probes.Attention(layers=0.34), probes.Query())

    def _weight(self, crops: CropBatch) -> Tensor:
        weight = super()._weight(crops)
        if crops.query is None or not crops.query.shape[1]:
            return weight
        words = normalize(crops.query.float(), dim=-1).mean(dim=1)
        unit = normalize(crops.probe(probes.Embeddings()).float(), dim=-1)
        relevance = ranking.min_max((unit @ words[:, :, None]).squeeze(-1))
        return weight * (relevance + 1e-6)


def _products(x: Tensor, token: Tensor) -> Tensor:
    """Return the products ``[B, N]`` of all rows of ``[B, N, C]`` with one of them; the tokens are ``[B, 1]``."""
    return torch.bmm(x, x.take_along_dim(token[:, :, None], dim=1).transpose(1, 2)).squeeze(-1)
