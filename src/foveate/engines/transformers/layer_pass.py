"""One forward pass of a model with methods inside its LLM, layer by layer, and what it leaves in a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.core.checks import selected_inside
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.in_llm import InLlmReducer, planned
from foveate.core.rows import Rows
from foveate.core.selection import SpanSelection
from foveate.core.spans import Crop
from foveate.engines.transformers.caches import given_cache, without_cache
from foveate.engines.transformers.given import Given, left_of
from foveate.engines.transformers.held import Current, Held
from foveate.engines.transformers.masks import select_mask
from foveate.engines.transformers.sight import Sight, peek

if TYPE_CHECKING:
    from foveate.engines.transformers.in_llm import Layers

STATIC = (
    "a static cache has one length for all layers, but methods inside the LLM shorten some: use the default "
    "DynamicCache"
)


class Pass:
    """One forward pass, layer by layer.

    Attributes
    ----------
    prompts
        The prompts that have visual tokens in this pass.
    cuts
        The boundaries at which tokens were dropped, and what was left behind them.
    peeking
        Whether a layer only runs to show what it would attend with.
    """

    def __init__(self, engine: Layers, inputs: Mapping[str, Any], prompts: list[Given]):
        self.engine, self.prompts = engine, prompts
        shown = embedded(inputs)
        self.batch, self.width, self.device = int(shown.shape[0]), int(shown.shape[1]), shown.device
        self.cuts: list[tuple[int, Current]] = []
        self.peeking = False
        self._cache = given_cache(inputs)
        self._past = int(self._cache.get_seq_length()) if self._cache is not None else 0
        self._held = engine.held(self._cache, self.batch) if self._past else {}
        self._now: dict[int, Held] = {}
        self._carried: Current | None = None
        self._made: dict[Any, Any] = {}
        self._current: Current | None = None
        if prompts:
            self._start(inputs.get("attention_mask"))

    def _start(self, mask: Tensor | None) -> None:
        decoder = self.engine.decoder
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            raise UnsupportedModelError(
                "gradient checkpointing runs layers twice, so a method inside the LLM would choose twice: switch it off"
            )
        if "flex" in str(decoder.config._attn_implementation):
            raise UnsupportedModelError(
                "masks of flex_attention cannot be cut layer by layer: load the model with attn_implementation='sdpa'"
            )
        kinds = getattr(decoder.config, "layer_types", None) or ["sliding_attention"]
        windows = "sliding_attention" in kinds and getattr(decoder.config, "sliding_window", None) is not None
        if windows and "flash" in str(decoder.config._attn_implementation):
            raise UnsupportedModelError(
                "flash attention counts the columns of a sliding window without the dropped ones: load the model with "
                "attn_implementation='sdpa'"
            )
        _check_cache(self._cache)
        self.sight = Sight(self)
        content = torch.ones(self.batch, self.width, dtype=torch.bool) if mask is None else mask.cpu().bool()
        content = content[:, -self.width :]
        self._right = bool((~content[:, -1]).any())
        columns = torch.where(content, torch.arange(self.width), -1).to(self.device)
        visual = [p.columns[: p.free] for p in self.prompts]
        origin = [torch.arange(p.free, device=self.device) for p in self.prompts]
        self._whole = Current(columns, content.sum(dim=1).tolist(), visual, origin)
        plans = [planned(self.engine.reducers, self.engine.depth, p.images) for p in self.prompts]
        self._plans = [{b: count for plan in parts for b, count in plan.items()} for parts in plans]

    @property
    def left(self) -> Current:
        """The tokens of the pass that are left so far."""
        return self._current or self._whole

    def visual(self) -> list[Tensor]:
        """Return the places of the free visual tokens of each prompt."""
        return self.left.visual

    def origins(self) -> list[Tensor]:
        """Return which of the tokens that the LLM was given these are."""
        return self.left.origin

    def places(self, sample: int, rows: Tensor) -> Tensor:
        """Return the columns of the first layer of some tokens of a prompt."""
        return self.left.index[sample].index_select(0, rows) + self._past

    def extent(self, sample: int) -> tuple[int, int]:
        """Return where the tokens of a prompt begin and end among those that are left."""
        width, length = self.left.index.shape[1], self.left.lengths[sample]
        return (0, length) if self._right else (width - length, width)

    def crops(self, prompt: int, unit: str) -> tuple[Crop, ...]:
        """Return the crops of a prompt as they are now."""
        origin, crops = self.left.origin[prompt], self.prompts[prompt].crops(unit)
        if unit == "prompt":
            return (Crop(torch.arange(len(origin)), None),)
        if len(origin) == self.prompts[prompt].free:
            return crops
        host = origin.cpu()
        return tuple(left_of(crop, host) for crop in crops)

    def wanted(self, boundary: int) -> list[int]:
        """Return how many free visual tokens of each prompt are to be left behind a boundary."""
        return [max(plan[boundary] - p.fixed, 0) for plan, p in zip(self._plans, self.prompts, strict=True)]

    def acting(self, boundary: int) -> InLlmReducer | None:
        """Return the method that drops tokens at a boundary in this pass, if there is one."""
        reducer = self.engine.boundaries.get(boundary) if self.prompts else None
        if reducer is None or not any(map(len, self.visual())):
            return None
        if reducer.adaptive or any(k < len(v) for k, v in zip(self.wanted(boundary), self.visual(), strict=True)):
            return reducer
        return None

    def show_whole_cache(self) -> None:
        """Let the model make its masks for the columns of the first layer, whatever the others hold."""
        if self._held:
            vars(self._cache).update(get_mask_sizes=self._whole_sizes, get_query_offset=lambda layer: self._past)

    def show_own_cache(self) -> None:
        """Undo `show_whole_cache`."""
        if self._held:
            for name in ("get_mask_sizes", "get_query_offset"):
                vars(self._cache).pop(name, None)

    def _whole_sizes(self, width: int, layer: int) -> tuple[int, int]:
        """Return the number of keys, and the first column, that a layer which holds everything would attend to."""
        window = getattr(self._cache.layers[layer], "sliding_window", None)  # type: ignore[union-attr]
        first = max(self._past - window + 1, 0) if window else 0
        return self._past + width - first, first

    def enter(self, number: int, layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords with which a layer runs instead of those given."""
        hidden = kwargs["hidden_states"]
        if number == 0:
            self._cache = given_cache(kwargs)
            if self.prompts:
                self.sight.start(hidden)
        if self._current is not None and self._carried is not self._current:
            hidden = self._current.gather(hidden)
        reducer = self.acting(number)
        if reducer is not None:
            hidden = self._cut(number, layer, {**kwargs, "hidden_states": hidden})
        self._carried = self._current
        if self.prompts:
            self.sight.entering(number, hidden)
        return self._arranged(number, {**kwargs, "hidden_states": hidden}, keep=True)

    def widen(self, output: Any) -> Any:
        """Give the output of a layer its full length."""
        if self._carried is None:
            return output
        carried, self._carried = self._carried, None
        if isinstance(output, tuple):
            return (carried.spread(output[0], self.width), *output[1:])
        return carried.spread(output, self.width)

    def finish(self, cache: Any) -> None:
        """Note for later passes what a cache holds after this one, and keep no more than `selections` needs."""
        cache = self._cache if cache is None else cache
        if cache is not None:
            self.engine.remember(cache, {**self._held, **self._now})
        self._cache, self._held, self._now, self._made = None, {}, {}, {}
        if self.prompts:
            del self.sight

    def selections(self, left: Current | None = None) -> list[list[SpanSelection]]:
        """Return which tokens of each image are left, by default behind the last boundary, prompt by prompt."""
        rows: list[list[SpanSelection]] = [[] for _ in range(self.batch)]
        if not self.prompts:
            return rows
        for prompt, origin in zip(self.prompts, (left or self.left).origin, strict=True):
            last = torch.arange(prompt.free, len(prompt.columns), device=origin.device)
            rows[prompt.sample] = prompt.selection(torch.cat([origin, last]))
        return rows

    def _cut(self, number: int, layer: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        hidden: Tensor = kwargs["hidden_states"]

        def look(rows: Tensor | None) -> Rows:
            return self._peek(number, layer, kwargs, rows)

        tokens = self.sight.tokens(number, hidden, look)
        with torch.no_grad():
            chosen = selected_inside(self.engine.boundaries[number], tokens)
        if all(c.is_identity for c in chosen):
            return hidden
        before = self.left
        if any(c.merge is not None for c in chosen):
            hidden = hidden.clone()
            for prompt, picked, visual in zip(self.prompts, chosen, before.visual, strict=True):
                hidden[prompt.sample, visual.index_select(0, picked.kept)] = picked.apply(hidden[prompt.sample, visual])
        self._current = self._after(before, chosen)
        self.cuts.append((number, self._current))
        return self._reordered(hidden)

    def _after(self, before: Current, chosen: Sequence[SpanSelection]) -> Current:
        """Work out what is left; shapes follow from the numbers of tokens, so that nothing waits for the device."""
        keep, lengths = before.index >= 0, list(before.lengths)
        kept = []
        for prompt, picked, visual in zip(self.prompts, chosen, before.visual, strict=True):
            places = visual.index_select(0, picked.kept)
            keep[prompt.sample, visual] = False
            keep[prompt.sample, places] = True
            lengths[prompt.sample] -= len(visual) - len(places)
            kept.append(places)
        width, whole = max(lengths), before.index.shape[1]
        if self._right:
            order = torch.argsort((~keep).int(), dim=1, stable=True)[:, :width]
        else:
            order = torch.argsort(keep.int(), dim=1, stable=True)[:, whole - width :]
        rank = keep.cumsum(dim=1) - 1
        visual_now = []
        for prompt, places in zip(self.prompts, kept, strict=True):
            shift = 0 if self._right else width - lengths[prompt.sample]
            visual_now.append(rank[prompt.sample].index_select(0, places) + shift)
        index = before.index.gather(1, order)
        if any(n < width for n in lengths):
            index = torch.where(keep.gather(1, order), index, -1)
        origin = [o.index_select(0, picked.kept) for o, picked in zip(before.origin, chosen, strict=True)]
        self._order = order
        return Current(index, lengths, visual_now, origin)

    def _reordered(self, hidden: Tensor) -> Tensor:
        order = self._order.to(hidden.device)
        return hidden[torch.arange(len(order), device=hidden.device)[:, None], order]

    def _peek(self, number: int, layer: nn.Module, kwargs: dict[str, Any], rows: Tensor | None) -> Rows:
        """Return what a layer would attend with if nothing were dropped in front of it."""
        arranged = without_cache(self._arranged(number, kwargs))
        cache = given_cache(kwargs)
        mask, arranged["attention_mask"] = arranged["attention_mask"], None
        self.peeking = True
        try:
            with torch.no_grad():
                seen = peek(layer, arranged, rows, kwargs["hidden_states"].shape[1])
        finally:
            self.peeking = False
        key = seen.key
        if self._past:
            old = cache.layers[number].keys  # type: ignore[union-attr]
            key = torch.cat([old.to(key.device), key], dim=2)
        window = seen.window if mask is None or mask.dim() == 2 else None
        return Rows(seen.query, key, seen.scaling, mask, window, seen.softcap)

    def _arranged(self, number: int, kwargs: dict[str, Any], keep: bool = False) -> dict[str, Any]:
        """Return the keywords of a layer for the columns that it holds."""
        current, held = self._current, self._held.get(number)
        if current is None and held is None:
            return kwargs
        out = {**kwargs, "position_ids": None}
        key = (id(current), id(held))
        if current is not None:
            now = self._made.get(key)
            if now is None:
                index = torch.where(current.index < 0, -1, current.index + self._past)
                old = held.until(self._past) if held else torch.arange(self._past, device=index.device)
                columns = torch.cat([old.expand(len(index), -1), index], dim=1)
                padded = current.padded or (held is not None and held.padded)
                now = self._made[key] = Held(columns, self._past + self.width, padded)
            if keep:
                self._now[number] = now
        else:
            assert held is not None
            now = held
        mask = kwargs.get("attention_mask")
        if mask is not None or now.padded:
            out["attention_mask"] = self._cached(
                (*key, id(mask), self._keys(number, now)), self._mask, number, now, mask
            )
        embeddings = kwargs.get("position_embeddings")
        if embeddings is not None:
            if self.engine.positions == "compact":
                kind = _kind(self.engine.decoder, number)
                out["position_embeddings"] = self._cached(
                    (*key, "rotary", kind), self._renumbered, now, kwargs["hidden_states"], kind
                )
            elif current is not None:
                out["position_embeddings"] = self._cached((*key, id(embeddings)), self._gathered, embeddings)
        return out

    def _cached(self, key: Any, make: Callable[..., Any], *args: Any) -> Any:
        if key not in self._made:
            self._made[key] = make(*args)
        return self._made[key]

    def _keys(self, number: int, now: Held) -> int:
        """Return how many columns a layer attends to: fewer than it was given, if it has a sliding window."""
        fresh = self.width if self._current is None else self._current.index.shape[1]
        layers = getattr(self._cache, "layers", ())
        if number < len(layers):
            return int(layers[number].get_mask_sizes(fresh)[0])
        return fresh

    def _mask(self, number: int, now: Held, mask: Any) -> Any:
        length = self._past + self.width
        columns = now.until(length)[:, -self._keys(number, now) :]
        if self._current is None:
            index = torch.arange(self.width, device=columns.device).expand(self.batch, -1)
        else:
            index = self._current.index
        name = str(self.engine.decoder.config._attn_implementation)
        return select_mask(mask, columns, index, self._past, length, now.padded, name)

    def _gathered(self, embeddings: Any) -> Any:
        assert self._current is not None
        return tuple(self._current.gather(x) for x in embeddings)

    def _renumbered(self, now: Held, hidden: Tensor, kind: str | None) -> Any:
        """Return rotary embeddings of tokens that are counted along what the layer holds."""
        columns = now.until(self._past + self.width)
        numbers = ((columns >= 0).cumsum(dim=1) - 1).clamp(min=0)[:, -hidden.shape[1] :]
        rotary = self.engine.decoder.rotary_emb
        named = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
        return rotary(hidden, position_ids=numbers, **named)


def embedded(inputs: Mapping[str, Any]) -> Tensor:
    """Return the tensor ``[B, q, ...]`` that tells the shape of a pass."""
    ids = inputs.get("input_ids")
    x = inputs.get("inputs_embeds") if ids is None else ids
    if x is None:
        raise InputError("a model with a method inside its LLM needs input_ids")
    return x  # type: ignore[no-any-return]


def _kind(decoder: Any, number: int) -> str | None:
    kinds = getattr(decoder.config, "layer_types", None)
    return kinds[number] if kinds else None


def _check_cache(cache: Any) -> None:
    for layer in getattr(cache, "layers", ()):
        if "Static" in type(layer).__name__:
            raise UnsupportedModelError(STATIC)
