"""ToMe: similar tokens become one inside the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.author import EncoderReducer, Inside, probes, ranking, register
from foveate.core.encoder import merged


@register("tome")
@dataclass(frozen=True)
class ToMe(EncoderReducer):
    """Token Merging (arXiv 2210.09461, ICLR 2023): pairs of similar tokens are averaged in every layer.

    Between attention and MLP, the tokens are split by the parity of their position. Each even token looks for the odd
    one with the most similar key (cosine, mean over heads); of these pairs the most similar merge, which averages the
    patches in them. To leave exactly T of N tokens, each of the L layers merges ``(N - T) // L`` pairs, the first ones
    one more. Works on each crop by itself.

    Parameters
    ----------
    keep
        The budget T.
    proportional
        Give a token of s patches ``log(s)`` more in the attention of later layers. Fused kernels without a mask, such
        as flash attention, need `False`; the authors found that to cost little.

    Notes
    -----
    Costs a product of ``(N / 2, N / 2)`` by the width of a head per layer.

    Deviations from the paper: the number of pairs per layer follows from the budget; where it is more than half of the
    tokens, which a single matching cannot merge, the layer matches several times. Behind the encoder each token takes
    the place of its first patch. How the published results in vision-language models were configured is UNVERIFIED.
    ``[CLS]`` and patches that show padding are never merged.
    """

    proportional: bool = True

    needs = (probes.Keys(),)
    after: ClassVar[Literal["attention", "mlp"]] = "attention"
    merges = "encoder"
    paper = "arXiv:2210.09461"
    complexity = "O(N^2 d) per layer of the encoder"

    @property
    def weighs_sizes(self) -> bool:
        return self.proportional

    def schedule(self, size: int, count: int, layers: int) -> list[int]:
        each, more = divmod(size - count, layers)
        return [size - each * i - min(i, more) for i in range(1, layers + 1)]

    def step(self, inside: Inside, count: int) -> tuple[Tensor, Tensor | None]:
        keys, sizes, size = inside.planes[probes.Keys()], inside.sizes, inside.sizes.shape[1]
        into = torch.arange(size, device=keys.device).expand(len(keys), -1)
        while size > count:
            left = max(count, size - size // 2)
            match = bipartite_matching(keys, size - left, inside.lead)
            into = match.gather(1, into)
            keys, sizes = merged(keys, match, sizes, left)
            size = left
        return into, None


def bipartite_matching(keys: Tensor, pairs: int, lead: int) -> Tensor:
    """Match tokens at even positions with those at odd ones, and merge the most similar pairs.

    Parameters
    ----------
    keys
        ``[B, n, d]``.
    pairs
        How many merge, at most half of the tokens.
    lead
        Tokens in front that do not take part; a position counts them.

    Returns
    -------
    Tensor
        ``[B, n]``: the new token of each one. First come the even ones that stay, in order of similarity, or of
        position if there are tokens in front; then the odd ones.
    """
    batch, size = keys.shape[:2]
    even, odd = (torch.arange((lead + i) % 2, size, 2, device=keys.device) for i in range(2))
    similarity = ranking.cosine_matrix(keys[:, even], keys[:, odd])
    order, stay = ranking.descending(similarity.amax(dim=-1)), len(even) - pairs
    merged, staying = order[:, :pairs], order[:, pairs:]
    if lead:
        staying = staying.sort(dim=1).values
    partner = similarity.argmax(dim=-1).gather(1, merged) + stay
    new = torch.cat([torch.arange(stay, device=keys.device).expand(batch, -1), partner], dim=1)
    slots = torch.empty_like(order).scatter(1, torch.cat([staying, merged], dim=1), new)
    into = torch.empty(batch, size, dtype=torch.long, device=keys.device)
    into[:, even] = slots
    into[:, odd] = torch.arange(stay, stay + len(odd), device=keys.device)
    return into
