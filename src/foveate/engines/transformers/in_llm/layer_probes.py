"""Probes of the layers of an LLM, read from one forward pass as it goes: what methods inside the LLM see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.core.ambient import neutral
from foveate.core.errors import InputError
from foveate.core.in_llm import InLlmReducer, LayerTokens
from foveate.core.probes import LayerAttention, LayerKeys, LayerStates, LlmProbe, Prior, TextStates
from foveate.core.rows import Rows
from foveate.core.spans import Span
from foveate.engines.transformers.in_llm.pass_state import PassState


class LayerProbes:
    """Collects what `InLlmReducer.select` reads, boundary by boundary."""

    def __init__(self, state: PassState):
        self._state = state
        self._planes: dict[LlmProbe, list[Tensor]] = {}
        self._judges: dict[InLlmReducer, list[Tensor]] = {}
        self._text_before: tuple[Tensor, ...] = ()

    def start(self, hidden: Tensor) -> None:
        """Take in what the LLM is given ``[B, q, D]``."""
        prompts = self._state.prompts
        for reducer in self._state.boundaries.reducers:
            if any(isinstance(p, LayerAttention) and p.rows == "judges" for p in reducer.needs):
                with torch.no_grad(), neutral():
                    self._judges[reducer] = [
                        reducer.judges(hidden[p.sample, visual].detach(), hidden[p.sample, text].detach())
                        for p, visual, text in zip(prompts, self._state.tokens.visual, self._rows("text"), strict=True)
                    ]

    def entering(self, layer: int, hidden: Tensor) -> None:
        """Take in the hidden states ``[B, R, D]`` that go into a layer."""
        self._states(layer, LayerStates("input"), hidden)
        reducer = self._state.acting(layer + 1)
        if reducer is not None and TextStates() in reducer.needs:
            self._text_before = self._text_states(hidden.detach())

    def inside(self, layer: int, hidden: Tensor) -> None:
        """Take in the hidden states ``[B, R, D]`` that go into a layer's feed-forward network."""
        self._states(layer, LayerStates("mlp"), hidden)

    def executed(self, layer: int, rows: Rows) -> None:
        """Take in what a layer attends with."""
        reducer = self._state.acting(layer + 1)
        if reducer is not None:
            for probe in reducer.needs:
                if isinstance(probe, LayerAttention) and not probe.ahead:
                    self._planes[probe] = self._attention(probe, rows, reducer)

    def tokens(self, boundary: int, hidden: Tensor, look_ahead: Callable[[Tensor | None], Rows]) -> LayerTokens:
        """Return what the method of a boundary sees, where the hidden states are ``[B, R, D]``.

        Parameters
        ----------
        look_ahead
            Returns what the layer behind the boundary would attend with; given rows ``[B, r]``, with their queries
            alone.
        """
        state, reducer = self._state, self._state.boundaries.at[boundary]
        prompts, remaining, hidden = state.prompts, state.tokens, hidden.detach()
        planes = self._planes_of(reducer, hidden, look_ahead)
        crops = [state.crops(i, reducer.unit) for i in range(len(prompts))]
        spans = tuple(
            Span(p.images[0][0], p.sample, 0, torch.arange(len(visual)), (1, 1, len(visual)), c)
            for p, visual, c in zip(prompts, remaining.visual, crops, strict=True)
        )
        if reducer.unit != "prompt":
            planes = {
                probe: [x[c.index.to(x.device)] for x, parts in zip(rows, crops, strict=True) for c in parts]
                for probe, rows in planes.items()
            }
        return LayerTokens(
            spans=spans,
            planes=planes,  # type: ignore[arg-type]
            device=hidden.device,
            boundary=boundary,
            depth=state.boundaries.depth,
            counts=tuple(state.wanted(boundary)),
            images=tuple(tuple(p.images) for p in prompts),
            origin=tuple(remaining.origin),
            places=self._first_layer_columns("visual"),
            rows=self._first_layer_columns("text"),
            judging=tuple(self._judges.get(reducer, ())),
            behind=tuple(p.behind for p in prompts),
            text=self._text_states(hidden) if TextStates() in reducer.needs else (),
            text_before=self._text_before if TextStates() in reducer.needs else (),
            frequencies=_frequencies(state.boundaries.decoder, boundary - 1).to(hidden.device),
        )

    def _planes_of(
        self, reducer: InLlmReducer, hidden: Tensor, look_ahead: Callable[[Tensor | None], Rows]
    ) -> dict[LlmProbe, list[Tensor]]:
        """Return the values of all probes of a method, ``[n, ...]`` per prompt."""
        planes, self._planes = self._planes, {}
        ahead = look_ahead(self._few_rows(reducer)) if reads_ahead(reducer) else None
        for probe in reducer.needs:
            if isinstance(probe, LayerAttention) and probe.ahead:
                assert ahead is not None
                planes[probe] = self._attention(probe, ahead, reducer)
            elif isinstance(probe, LayerKeys):
                assert ahead is not None
                planes[probe] = self._of_visual(ahead.key[:, :, -hidden.shape[1] :].float().mean(dim=1))
            elif isinstance(probe, Prior):
                planes[probe] = self._priors(reducer)
            elif probe == LayerStates():
                planes[probe] = self._of_visual(hidden)
        return planes

    def _few_rows(self, reducer: InLlmReducer) -> Tensor | None:
        """Return the only rows ``[B, r]`` of the layer behind the boundary that a method reads, `None` for all."""
        kinds = {p.rows for p in reducer.needs if isinstance(p, LayerAttention) and p.ahead} or {"last"}
        return self._index(*kinds)[0] if len(kinds) == 1 and kinds <= {"last", "text", "judges"} else None

    def _priors(self, reducer: InLlmReducer) -> list[Tensor]:
        prompts = self._state.prompts
        if any(reducer not in p.priors for p in prompts):
            raise InputError(
                f"{reducer.name} ranks tokens by scores from elsewhere: use foveate.guide(large, small, ...), "
                "or run the model inside `with handle.scored(scores):`"
            )
        pairs = zip(prompts, self._state.tokens.origin, strict=True)
        return [p.priors[reducer].index_select(0, origin) for p, origin in pairs]

    def _first_layer_columns(self, kind: str) -> tuple[Tensor, ...]:
        pairs = zip(self._state.prompts, self._rows(kind), strict=True)
        return tuple(self._state.first_layer_columns(p.sample, rows) for p, rows in pairs)

    def _text_states(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the states of the text behind the last image of each prompt, which may be none."""
        pairs = zip(self._state.prompts, self._rows("text"), strict=True)
        return tuple(hidden[p.sample, rows[len(rows) - p.behind :]] for p, rows in pairs)

    def _rows(self, kind: str) -> list[Tensor]:
        """Return the rows of a kind of each prompt, as places among the R tokens that are left."""
        if kind == "visual":
            return self._state.tokens.visual
        found = []
        for prompt in self._state.prompts:
            first, end = self._state.extent(prompt.sample)
            count = {"last": 1, "all": end - first}.get(kind, max(prompt.behind, 1))
            found.append(torch.arange(end - count, end, device=self._state.device))
        return found

    def _index(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return the rows of a kind, padded, ``[B, r]``, and which of them count ``[B, r]``."""
        rows = self._rows(kind)
        size = max(map(len, rows))
        index = torch.zeros(self._state.batch, size, dtype=torch.long, device=self._state.device)
        counts = torch.zeros(self._state.batch, size, device=self._state.device)
        for prompt, row in zip(self._state.prompts, rows, strict=True):
            index[prompt.sample, : len(row)] = row
            counts[prompt.sample, : len(row)] = 1.0
        return index, counts

    @torch.no_grad()
    @neutral()
    def _attention(self, probe: LayerAttention, rows: Rows, reducer: InLlmReducer) -> list[Tensor]:
        index, counts = self._index(probe.rows)
        if probe.rows == "judges":
            for prompt, judges in zip(self._state.prompts, self._judges[reducer], strict=True):
                counts[prompt.sample, : len(judges)] *= judges
        visual = self._state.tokens.visual
        size = max(map(len, visual))
        columns = torch.zeros(self._state.batch, 1, 1, size, dtype=torch.long, device=index.device)
        for prompt, places in zip(self._state.prompts, visual, strict=True):
            # The keys of a cache come before those of the pass.
            columns[prompt.sample, 0, 0, : len(places)] = places + rows.key.shape[2] - rows.width
        # Other prompts of the batch have no such rows, and a method may choose no judge: nothing is received then.
        share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
        total: Any = 0.0
        parts = []
        for part, block in rows.attention(index):
            received = block.gather(3, columns.expand(*block.shape[:3], -1))
            if probe.over == "nothing":
                parts.append(received)
            else:
                total = total + (received * share[:, None, part, None]).sum(dim=2)
        lengths = list(map(len, visual))
        if probe.over == "nothing":
            whole = torch.cat(parts, dim=2).permute(0, 3, 1, 2)  # [B, n, H, R]
            heights = [len(r) for r in self._rows(probe.rows)]
            return [whole[p.sample, :n, :, :r] for p, n, r in zip(self._state.prompts, lengths, heights, strict=True)]
        result = total.mean(dim=1) if probe.over == "rows and heads" else total.transpose(1, 2)
        return [result[p.sample, :n] for p, n in zip(self._state.prompts, lengths, strict=True)]

    def _states(self, layer: int, probe: LayerStates, hidden: Tensor) -> None:
        reducer = self._state.acting(layer + 1)
        if reducer is not None and probe in reducer.needs:
            self._planes[probe] = self._of_visual(hidden.detach())

    def _of_visual(self, x: Tensor) -> list[Tensor]:
        return [x[p.sample, places] for p, places in zip(self._state.prompts, self._state.tokens.visual, strict=True)]


def _frequencies(decoder: Any, layer: int) -> Tensor:
    """Return the angular frequencies of a layer's rotary embedding, none if it has no such embedding."""
    rotary, kinds = getattr(decoder, "rotary_emb", None), getattr(decoder.config, "layer_types", None)
    # Gemma 3 has one set for layers with a sliding window and one for the others.
    own = getattr(rotary, f"{kinds[layer]}_inv_freq", None) if kinds else None
    found: Tensor = getattr(rotary, "inv_freq", torch.empty(0)) if own is None else own
    return found


def reads_executed(reducer: InLlmReducer) -> bool:
    """Return whether a method reads the attention of a layer as it ran."""
    return any(isinstance(p, LayerAttention) and not p.ahead for p in reducer.needs)


def reads_ahead(reducer: InLlmReducer) -> bool:
    """Return whether a method reads what a layer would attend with."""
    return any(isinstance(p, LayerKeys) or (isinstance(p, LayerAttention) and p.ahead) for p in reducer.needs)
