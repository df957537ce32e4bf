"""FlowCut: the encoder drops, every second layer, what information no longer flows through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.author import EncoderReducer, FoveateError, Inside, probes, ranking, register


@dataclass(frozen=True)
class Flow(probes.LayerProbe):
    """FlowCut's score of one layer, ``[N]`` per crop.

    The shares of ``[CLS]`` attention and of similarity to the value of ``[CLS]`` (softmax of products over all tokens),
    each averaged over heads and scaled to sum to one, are added and multiplied with the L1 norm of the value (mean over
    heads). Without ``[CLS]``: the attention of the mean query, times the norm.
    """

    def rows(self, length: int, lead: int) -> int:
        return 2 if lead else 1

    def read(self, heads: probes.Heads) -> Tensor:
        value, lead = heads.value.float(), heads.lead
        norm = value[:, :, lead:].mean(dim=1).abs().sum(dim=-1)
        if not lead:
            query = heads.query.float().mean(dim=2, keepdim=True)
            logits = torch.matmul(query, heads.key.float().transpose(-1, -2)) * heads.scaling
            return logits.softmax(dim=-1).mean(dim=1)[:, 0] * norm
        attention = probes.cls_row(heads.query, heads.key, heads.scaling)[:, lead - 1 :]
        likeness = probes.cls_row(value, value, 1.0)[:, lead - 1 :]
        return (_shares(attention) + _shares(likeness)) * norm


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


@register("flowcut")
@dataclass(frozen=True)
class FlowCut(EncoderReducer):
    """FlowCut (arXiv 2505.19536, NeurIPS 2025): prunes inside the encoder, a little in every second layer.

    Tokens are ranked by the score of `Flow`, the mean of this layer's and of the running score so far. At the layers
    from which an even number r of layers is left before the last cut, ``(n - T) / sqrt(r) * (1 - entropy**2)`` of the n
    tokens go. The last cut leaves T, one layer before the features. Works on each crop by itself.

    Parameters
    ----------
    keep
        The budget T.
    entropy
        Entropy of ``[CLS]`` attention as a share of its maximum: the higher, the fewer tokens go before the last cut.

    Notes
    -----
    Reads one row of attention and one of value products per layer.

    Deviations from the paper: `entropy` is a constant (0.9 is UNVERIFIED), where the official code measures it in every
    layer and drops as many tokens as the crop of the batch that drops most; so the numbers of tokens follow from N and
    T, and a crop does not depend on its batch. That count of the official code is not offered. ``[CLS]`` and patches
    that show padding stay until the end. Pruning inside the LLM, which the official code adds for LLaVA-NeXT, is left
    out, and every crop has its own budget there.
    """

    entropy: float = 0.9

    needs = (Flow(),)
    paper = "arXiv:2505.19536"
    complexity = "O(N (C + log N)) per layer of the encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.entropy <= 1.0:
            raise FoveateError(f"entropy is a share of its maximum, from 0 to 1, not {self.entropy}")

    def schedule(self, size: int, count: int, layers: int) -> list[int]:
        left = []
        for remaining in range(layers - 2, -2, -1):
            if remaining <= 0:
                size = count
            elif remaining % 2 == 0:
                drop = round((size - count) / remaining**0.5 * (1 - self.entropy**2))
                size = max(size - drop, count)
            left.append(size)
        return left

    def step(self, inside: Inside, count: int) -> tuple[Tensor, Tensor | None]:
        score = inside.planes[Flow()]
        if inside.memory is not None:
            score = (inside.memory + score) / 2
        new = torch.arange(count, device=score.device).expand(len(score), -1)
        dropped = torch.full(score.shape, -1, device=score.device)
        return dropped.scatter(1, ranking.top(score, count), new), score
