"""The keywords with which a layer runs instead of its own: masks and positions of the columns that it keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.engines.transformers.caches import KEPT_COLUMNS, note, noted
from foveate.engines.transformers.in_llm.kept_columns import KeptColumns
from foveate.engines.transformers.in_llm.masks import select_mask
from foveate.engines.transformers.in_llm.pass_state import PassState


class LayerInputs:
    """Masks and rotary embeddings for the columns that each layer keeps.

    Layers of one pass that keep the same columns share them.

    Attributes
    ----------
    cache
        The KV cache of the pass.
    """

    def __init__(self, state: PassState, cache: Any):
        self._state, self.cache = state, cache
        known: dict[int, KeptColumns] = noted(cache, KEPT_COLUMNS) or {}
        self._before = {layer: kept.expanded(state.batch) for layer, kept in known.items()}
        self._now: dict[int, KeptColumns] = {}
        self._made: dict[Any, Any] = {}

    def show_whole_cache(self) -> None:
        """Let the model make its masks for the columns of the first layer, whatever the others keep.

        `transformers` asks the cache for the sizes of one layer of each kind, and takes that layer's mask for all.
        """
        if self._before:
            vars(self.cache).update(get_mask_sizes=self._whole_sizes, get_query_offset=lambda layer: self._state.past)

    def show_own_cache(self) -> None:
        """Undo `show_whole_cache`."""
        if self._before:
            for name in ("get_mask_sizes", "get_query_offset"):
                vars(self.cache).pop(name, None)

    def _whole_sizes(self, width: int, layer: int) -> tuple[int, int]:
        """Return the number of keys, and the first column, that a layer which keeps everything would attend to."""
        past = self._state.past
        window = getattr(self.cache.layers[layer], "sliding_window", None)
        first = max(past - window + 1, 0) if window else 0
        return past + width - first, first

    def of_layer(self, number: int, kwargs: dict[str, Any], keep: bool = False) -> dict[str, Any]:
        """Return the keywords of a layer for the columns that it keeps.

        Parameters
        ----------
        kwargs
            Its keywords, with the hidden states of the tokens that are left.
        keep
            Whether the layer runs with them, and so fills its cache.
        """
        remaining, before = self._state.remaining, self._before.get(number)
        if remaining is None and before is None:
            return kwargs
        # Layers that take position_ids use them for flash attention alone: gaps in them look like packed prompts.
        out = {**kwargs, "position_ids": None}
        key = (id(remaining), id(before))
        now = self._cached(key, self._columns, before)
        if keep and remaining is not None:
            self._now[number] = now
        mask = kwargs.get("attention_mask")
        if mask is not None or now.padded:
            size = self._keys(number)
            out["attention_mask"] = self._cached((*key, id(mask), size), self._mask, size, now, mask)
        embeddings = kwargs.get("position_embeddings")
        if embeddings is not None:
            if self._state.boundaries.positions == "compact":
                kind = kind_of(self._state.boundaries.decoder, number)
                numbering = (*key, "rotary", kind)
                out["position_embeddings"] = self._cached(
                    numbering, self._renumbered, now, kwargs["hidden_states"], kind
                )
            elif remaining is not None:
                gathered = (*key, id(embeddings))
                out["position_embeddings"] = self._cached(
                    gathered, lambda: tuple(remaining.gather(x) for x in embeddings)
                )
        if remaining is not None:
            for name, plane in self._further(kwargs):
                out[name] = remaining.gather(plane)
        return out

    def _further(self, kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """Return what a layer is given of each token beside its state, such as Gemma 4's inputs per layer."""
        known = ("hidden_states", "attention_mask", "position_ids", "position_embeddings")
        width = self._state.width
        return [
            (name, x)
            for name, x in kwargs.items()
            if name not in known and isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == width
        ]

    def kept(self, number: int) -> KeptColumns | None:
        """Return what a layer has in this pass, `None` for all columns: of one that runs, or is about to."""
        remaining, before = self._state.remaining, self._before.get(number)
        if remaining is None and before is None:
            return None
        return self._cached((id(remaining), id(before)), self._columns, before)  # type: ignore[no-any-return]

    def finish(self, cache: Any) -> None:
        """Note on a cache what its layers keep after this pass."""
        if kept := {**self._before, **self._now}:
            note(cache, KEPT_COLUMNS, kept)

    def _cached(self, key: Any, make: Callable[..., Any], *args: Any) -> Any:
        if key not in self._made:
            self._made[key] = make(*args)
        return self._made[key]

    def _columns(self, before: KeptColumns | None) -> KeptColumns:
        """Return what a layer keeps after this pass that kept so much before it."""
        state, remaining = self._state, self._state.remaining
        if remaining is None:
            assert before is not None
            return before  # `until` adds the columns of a pass that drops none
        index = torch.where(remaining.index < 0, -1, remaining.index + state.past)
        old = before.until(state.past) if before else torch.arange(state.past, device=index.device)
        columns = torch.cat([old.expand(len(index), -1), index], dim=1)
        padded = remaining.padded or (before is not None and before.padded)
        return KeptColumns(columns, state.past + state.width, padded)

    def _keys(self, number: int) -> int:
        """Return how many columns a layer attends to: fewer than it was given, if it has a sliding window."""
        layers = getattr(self.cache, "layers", ())
        if number < len(layers):
            return int(layers[number].get_mask_sizes(self._state.current_width)[0])
        return self._state.current_width  # the layers of a new cache come into being as they run

    def _mask(self, size: int, now: KeptColumns, mask: Any) -> Any:
        state = self._state
        length = state.past + state.width
        columns = now.until(length)[:, -size:]
        if state.remaining is None:
            index = torch.arange(state.width, device=columns.device).expand(state.batch, -1)
        else:
            index = state.remaining.index
        name = str(state.boundaries.decoder.config._attn_implementation)
        return select_mask(mask, columns, index, state.past, length, now.padded, name)

    def _renumbered(self, now: KeptColumns, hidden: Tensor, kind: str | None) -> Any:
        """Return rotary embeddings of tokens that are counted along what the layer keeps."""
        columns = now.until(self._state.past + self._state.width)
        numbers = ((columns >= 0).cumsum(dim=1) - 1).clamp(min=0)[:, -hidden.shape[1] :]
        rotary = self._state.boundaries.decoder.rotary_emb
        # Gemma 3 turns tokens by other frequencies in layers with a sliding window.
        named = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
        return rotary(hidden, position_ids=numbers, **named)


def kind_of(decoder: Any, number: int) -> str | None:
    """Return the kind of a layer, `None` where all layers are alike."""
    kinds = getattr(decoder.config, "layer_types", None)
    return kinds[number] if kinds else None
