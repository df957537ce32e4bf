"""Attention of a few query rows, computed beside any attention implementation and without a full map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Rows:
    """What a decoder layer attends with, in a pass over R tokens that see K keys.

    Attributes
    ----------
    query
        ``[B, H, R, d]``, rotated, not yet scaled.
    key
        ``[B, H_kv, K, d]``: the keys of a cache and then those of the R tokens.
    scaling
        Factor on the products.
    mask
        ``[B or 1, 1, R, K]`` as the layer was given it, true or zero where a key is seen; or ``[B, K]``, zero at
        padding; `None` if only causality hides keys.
    window
        How many keys up to its own a token sees; `None` if all.
    softcap
        Bound on the logits, as in Gemma 2.
    bias
        ``[B, K]``: what the logits of each key are raised by.
    """

    query: Tensor
    key: Tensor
    scaling: float
    mask: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    bias: Tensor | None = None

    @classmethod
    def of_call(cls, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]) -> Rows:
        """Take up what an attention function of `transformers` is called with."""
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = kwargs.get("sliding_window") if mask is None or mask.dim() == 2 else None
        return cls(query.detach(), key.detach(), scaling, mask, window, kwargs.get("softcap"))

    @property
    def width(self) -> int:
        """Number of tokens of the pass, R."""
        return int(self.query.shape[2])

    def attention(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the attention of some rows ``[B, r]``, in chunks: which of the r, and ``[B, H, chunk, K]`` float32."""
        batch, heads, _, width = self.query.shape
        groups, keys = self.key.shape[1:3]
        key = self.key.float().transpose(-1, -2)
        for start in range(0, rows.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            index = rows[:, part]
            size = index.shape[1]
            query = self.query.gather(2, index[:, None, :, None].expand(-1, heads, -1, width)).float()
            logits = torch.matmul(query.reshape(batch, groups, -1, width), key) * self.scaling
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            logits = logits.reshape(batch, heads, size, keys)
            if self.bias is not None:
                logits = logits + self.bias[:, None, None].to(logits)
            hidden = torch.finfo(torch.float32).min
            yield part, logits.masked_fill(~self._visible(index)[:, None], hidden).softmax(dim=-1)

    def _visible(self, rows: Tensor) -> Tensor:
        """Return which keys some rows ``[B, r]`` see, ``[B, r, K]`` bool."""
        keys = self.key.shape[2]
        if self.mask is not None and self.mask.dim() == 4:
            mask = self.mask[:, 0].expand(len(rows), -1, -1)
            picked = mask.gather(1, rows[:, :, None].expand(-1, -1, mask.shape[-1]))[..., :keys]
            return picked if picked.dtype == torch.bool else picked == 0
        place = rows + keys - self.width
        column = torch.arange(keys, device=rows.device)
        visible = column <= place[:, :, None]
        if self.window is not None:
            visible &= column > place[:, :, None] - self.window
        if self.mask is not None:
            visible &= self.mask[:, None, -keys:].bool()
        return visible
