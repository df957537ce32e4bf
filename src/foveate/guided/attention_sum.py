"""The attention that visual tokens get from a prompt and its answer, summed up while a model generates."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import UnsupportedModelError
from foveate.core.rows import Rows
from foveate.engines.transformers.prompt_tokens import PromptTokens
from foveate.families.taps import Watch
from foveate.families.tower import attention_of
from foveate.methods.sgl import SGL


class AttentionSum:
    """The attention that visual tokens get while a model generates, summed as it goes; no map is stored.

    Parameters
    ----------
    prompts
        The prompts with visual tokens.
    mask
        ``[B, L]``: their attention mask.
    ids
        ``[B, L]``: the prompts.
    stops
        Ids that end an answer: their rows do not count, nor do those behind them.
    method
        Which rows count, and how.
    """

    def __init__(self, prompts: Sequence[PromptTokens], mask: Tensor | None, ids: Tensor, stops: Tensor, method: SGL):
        self.prompts, self.method, self.stops = prompts, method, stops
        batch, width = ids.shape
        sizes = [len(p.columns) for p in prompts]
        self._columns = torch.zeros(batch, max(sizes, default=0), dtype=torch.long, device=ids.device)
        rows = [torch.empty(0, dtype=torch.long)] * batch
        for p, n in zip(prompts, sizes, strict=True):
            self._columns[p.sample, :n] = p.columns
            content = torch.ones(width) if mask is None else mask[p.sample].cpu()
            text = content.nonzero().flatten()[-max(p.behind, 1) :]
            extra = [p.columns[-1:].cpu()] if method.include_last_visual and p.behind else []
            rows[p.sample] = torch.cat([*extra, text])
        self._prompt_rows = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(ids.device)
        lengths = torch.tensor([len(r) for r in rows])
        counting = torch.arange(self._prompt_rows.shape[1])[None] < lengths[:, None]
        self._parts = [torch.zeros(self._columns.shape, device=ids.device) for _ in range(2)]
        self._rows = [lengths.to(ids.device), torch.zeros_like(lengths).to(ids.device)]
        self._index, self._weights = self._prompt_rows, counting.to(ids.device).float()
        self._alive = torch.ones(batch, dtype=torch.bool, device=ids.device)
        self._seen = self._decoding = self._layers = 0
        self._thread = threading.get_ident()

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Sum up what the layers of a model attend to in the body of the ``with`` statement."""
        if not self.prompts:
            yield
            return
        decoder = model.get_decoder()
        layers = decoder.layers[: decoder.config.num_hidden_layers]
        hook = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        watch = Watch([attention_of(layer) for layer in layers], self._read)
        try:
            yield
        finally:
            hook.remove()
            watch.remove()
        if not self._layers:
            raise UnsupportedModelError(f"the attention of {type(decoder).__name__} could not be read")

    def scores(self) -> list[Tensor]:
        """Return the sum per prompt, ``[n]`` float32."""
        parts = self._parts
        if self.method.normalise:
            parts = [x / n.clamp(min=1)[:, None] / 2 for x, n in zip(parts, self._rows, strict=True)]
        total = parts[0] + parts[1]
        return [total[p.sample, : len(p.columns)] for p in self.prompts]

    def begin(self, ids: Tensor) -> None:
        """Take up a pass over ids ``[B, q]``: first that over the prompts, then one for each token of the answers."""
        if self._seen:
            self._decoding = 1
            self._alive = self._alive & ~torch.isin(ids[:, -1], self.stops)
            self._index = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device)
            self._weights = self._alive[:, None].float()
            self._rows[1] = self._rows[1] + self._alive
        self._seen += ids.shape[1]

    def add(self, rows: Rows) -> None:
        """Add what a layer attends to in this pass."""
        self._layers += 1
        device = rows.key.device
        # A layer with a sliding window holds the last columns alone; what it does not hold gets nothing.
        columns = self._columns.to(device) - (self._seen - rows.key.shape[2])
        part = self._parts[self._decoding]
        for chunk, block in rows.attention(self._index.to(device)):
            counted = (block.sum(dim=1) * self._weights[:, chunk, None].to(device)).sum(dim=1)
            part += (counted.gather(1, columns.clamp(min=0)) * (columns >= 0)).to(part.device)

    def _begin(self, _: Any, __: Any, kwargs: Mapping[str, Any]) -> None:
        if threading.get_ident() == self._thread:
            self.begin(kwargs["input_ids"])

    def _read(self, _: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> None:
        if threading.get_ident() == self._thread:
            self.add(Rows.of_call(query, key, mask, kwargs))
