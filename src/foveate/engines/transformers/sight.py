"""What methods inside the language model see: probes of its layers, read from one forward pass as it goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.core.in_llm import InLlmReducer, LayerTokens
from foveate.core.probes import LayerAttention, LayerKeys, LayerStates, LlmProbe, Prior, TextStates
from foveate.core.rows import Rows
from foveate.core.tokens import Span
from foveate.families.tower import attention_of

if TYPE_CHECKING:
    from foveate.engines.transformers.layer_pass import Pass

_FEW = 4  # rows worth a pass of their own: at most a quarter of the sequence


class Seen(Exception):  # noqa: N818
    """Ends a layer once what it attends with is known."""

    def __init__(self, rows: Rows):
        super().__init__()
        self.rows = rows


class Sight:
    """Collects what `InLlmReducer.select` reads, boundary by boundary."""

    def __init__(self, run: Pass):
        self.run = run
        self.planes: dict[LlmProbe, list[Tensor]] = {}
        self._judges: dict[InLlmReducer, list[Tensor]] = {}
        self._before: tuple[Tensor, ...] = ()

    def start(self, hidden: Tensor) -> None:
        """Take in what the LLM is given ``[B, q, D]``."""
        for reducer in self.run.engine.reducers:
            if any(isinstance(p, LayerAttention) and p.rows == "judges" for p in reducer.needs):
                with torch.no_grad():
                    self._judges[reducer] = [
                        reducer.judges(hidden[p.sample, visual].detach(), hidden[p.sample, text].detach())
                        for p, visual, text in zip(self.run.prompts, self._visual(), self._text(), strict=True)
                    ]

    def entering(self, layer: int, hidden: Tensor) -> None:
        """Take in the hidden states ``[B, R, D]`` that go into a layer."""
        self._states(layer, LayerStates("input"), hidden)
        reducer = self.run.acting(layer + 1)
        if reducer is not None and TextStates() in reducer.needs:
            self._before = self._text_states(hidden.detach())

    def inside(self, layer: int, hidden: Tensor) -> None:
        """Take in the hidden states ``[B, R, D]`` that go into a layer's feed-forward network."""
        self._states(layer, LayerStates("mlp"), hidden)

    def executed(self, layer: int, rows: Rows) -> None:
        """Take in what a layer attends with."""
        reducer = self.run.acting(layer + 1)
        if reducer is not None:
            for probe in reducer.needs:
                if isinstance(probe, LayerAttention) and not probe.ahead:
                    self.planes[probe] = self._attention(probe, rows, reducer)

    def tokens(self, boundary: int, hidden: Tensor, peek: Callable[[Tensor | None], Rows]) -> LayerTokens:
        """Return what the method of a boundary sees, where the hidden states are ``[B, R, D]``.

        Parameters
        ----------
        peek
            Returns what the layer behind the boundary would attend with; given rows ``[B, r]``, with their queries
            alone.
        """
        run, reducer = self.run, self.run.engine.boundaries[boundary]
        planes, self.planes = self.planes, {}
        hidden = hidden.detach()
        ahead = None
        for probe in reducer.needs:
            if isinstance(probe, LayerAttention) and probe.ahead:
                ahead = ahead or peek(None if probe.rows in ("visual", "all") else self._index(probe.rows)[0])
                planes[probe] = self._attention(probe, ahead, reducer)
            elif isinstance(probe, LayerKeys):
                ahead = ahead or peek(self._index("last")[0])
                keys = ahead.key[:, :, -hidden.shape[1] :].float().mean(dim=1)
                planes[probe] = self._of_visual(keys)
            elif isinstance(probe, Prior):
                if any(reducer not in p.priors for p in run.prompts):
                    raise InputError(
                        f"{reducer.name} ranks tokens by scores from elsewhere: use foveate.guide(large, small, ...), "
                        "or run the model inside `with handle.scored(scores):`"
                    )
                planes[probe] = [
                    p.priors[reducer].index_select(0, origin)
                    for p, origin in zip(run.prompts, run.origins(), strict=True)
                ]
            elif probe == LayerStates():
                planes[probe] = self._of_visual(hidden)
        crops = [run.crops(i, reducer.unit) for i in range(len(run.prompts))]
        spans = tuple(
            Span(p.images[0][0], p.sample, 0, torch.arange(len(visual)), (1, 1, len(visual)), c)
            for p, visual, c in zip(run.prompts, self._visual(), crops, strict=True)
        )
        if reducer.unit != "prompt":
            planes = {
                probe: [x[c.index.to(x.device)] for x, parts in zip(rows, crops, strict=True) for c in parts]
                for probe, rows in planes.items()
            }
        rows = self._rows("text")
        return LayerTokens(
            spans=spans,
            planes=planes,  # type: ignore[arg-type]
            device=hidden.device,
            boundary=boundary,
            depth=run.engine.depth,
            counts=tuple(run.wanted(boundary)),
            images=tuple(tuple(p.images) for p in run.prompts),
            origin=tuple(run.origins()),
            places=tuple(run.places(p.sample, x) for p, x in zip(run.prompts, self._visual(), strict=True)),
            rows=tuple(run.places(p.sample, x) for p, x in zip(run.prompts, rows, strict=True)),
            judging=tuple(self._judges.get(reducer, ())),
            behind=tuple(p.behind for p in run.prompts),
            text=self._text_states(hidden) if TextStates() in reducer.needs else (),
            text_before=self._before if TextStates() in reducer.needs else (),
            frequencies=_frequencies(run.engine.decoder, boundary - 1).to(hidden.device),
        )

    def _visual(self) -> list[Tensor]:
        return self.run.visual()

    def _text(self) -> list[Tensor]:
        return self._rows("text")

    def _text_states(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the states of the text behind the last image of each prompt, which may be none."""
        pairs = zip(self.run.prompts, self._text(), strict=True)
        return tuple(hidden[p.sample, rows[len(rows) - p.behind :]] for p, rows in pairs)

    def _rows(self, kind: str) -> list[Tensor]:
        """Return the rows of a kind of each prompt, as places among the R tokens that are left."""
        if kind == "visual":
            return self._visual()
        found = []
        for prompt in self.run.prompts:
            first, end = self.run.extent(prompt.sample)
            count = {"last": 1, "all": end - first}.get(kind, max(prompt.behind, 1))
            found.append(torch.arange(end - count, end, device=self.run.device))
        return found

    def _index(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return the rows of a kind, padded, ``[B, r]``, and which of them count ``[B, r]``."""
        rows = self._rows(kind)
        size = max(map(len, rows))
        index = torch.zeros(self.run.batch, size, dtype=torch.long, device=self.run.device)
        counts = torch.zeros(self.run.batch, size, device=self.run.device)
        for prompt, row in zip(self.run.prompts, rows, strict=True):
            index[prompt.sample, : len(row)] = row
            counts[prompt.sample, : len(row)] = 1.0
        return index, counts

    @torch.no_grad()
    def _attention(self, probe: LayerAttention, rows: Rows, reducer: InLlmReducer) -> list[Tensor]:
        index, counts = self._index(probe.rows)
        for prompt, judges in zip(self.run.prompts, self._judges.get(reducer, ()), strict=False):
            if probe.rows == "judges":
                counts[prompt.sample, : len(judges)] *= judges
        visual = self._visual()
        size = max(map(len, visual))
        columns = torch.zeros(self.run.batch, 1, 1, size, dtype=torch.long, device=index.device)
        for prompt, places in zip(self.run.prompts, visual, strict=True):
            columns[prompt.sample, 0, 0, : len(places)] = places + rows.key.shape[2] - rows.width
        share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
        total: Any = 0.0
        parts = []
        for part, block in rows.attention(index):
            seen = block.gather(3, columns.expand(*block.shape[:3], -1))
            if probe.over == "nothing":
                parts.append(seen)
            else:
                total = total + (seen * share[:, None, part, None]).sum(dim=2)
        lengths = list(map(len, visual))
        if probe.over == "nothing":
            whole = torch.cat(parts, dim=2).permute(0, 3, 1, 2)  # [B, n, H, R]
            heights = [len(r) for r in self._rows(probe.rows)]
            return [whole[p.sample, :n, :, :r] for p, n, r in zip(self.run.prompts, lengths, heights, strict=True)]
        result = total.mean(dim=1) if probe.over == "rows and heads" else total.transpose(1, 2)
        return [result[p.sample, :n] for p, n in zip(self.run.prompts, lengths, strict=True)]

    def _states(self, layer: int, probe: LayerStates, hidden: Tensor) -> None:
        reducer = self.run.acting(layer + 1)
        if reducer is not None and probe in reducer.needs:
            self.planes[probe] = self._of_visual(hidden.detach())

    def _of_visual(self, x: Tensor) -> list[Tensor]:
        return [x[p.sample, places] for p, places in zip(self.run.prompts, self._visual(), strict=True)]


def _frequencies(decoder: Any, layer: int) -> Tensor:
    """Return the angular frequencies of a layer's rotary embedding, none if it has no such embedding."""
    rotary, kinds = getattr(decoder, "rotary_emb", None), getattr(decoder.config, "layer_types", None)
    own = getattr(rotary, f"{kinds[layer]}_inv_freq", None) if kinds else None
    found: Tensor = getattr(rotary, "inv_freq", torch.empty(0)) if own is None else own
    return found


def reads_executed(reducer: InLlmReducer) -> bool:
    """Return whether a method reads the attention of a layer as it ran."""
    return any(isinstance(p, LayerAttention) and not p.ahead for p in reducer.needs)


def reads_ahead(reducer: InLlmReducer) -> bool:
    """Return whether a method reads what a layer would attend with."""
    return any(isinstance(p, LayerKeys) or (isinstance(p, LayerAttention) and p.ahead) for p in reducer.needs)


def peek(layer: nn.Module, kwargs: Mapping[str, Any], rows: Tensor | None, width: int) -> Rows:
    """Return what a layer would attend with, without running the rest of it.

    Parameters
    ----------
    kwargs
        The keywords of the layer's call, without a cache.
    rows
        ``[B, r]``: the only rows whose queries count; `None` for all.
    width
        Number of tokens R.
    """
    attention = attention_of(layer)
    with ExitStack() as stack:
        for name in ("v_proj", "q_proj"):
            projection = getattr(attention, name, None)
            if not isinstance(projection, nn.Module):
                continue
            if name == "v_proj":
                stack.enter_context(_Only(projection, None, width))
            elif rows is not None and rows.shape[1] * _FEW <= width:
                stack.enter_context(_Only(projection, rows, width))
        try:
            layer(**kwargs)
        except Seen as seen:
            return seen.rows
    raise AssertionError(f"{type(attention).__name__} did not attend")


class _Only:
    """Lets a projection work on a few rows alone, and fills up what the layer expects behind it."""

    def __init__(self, projection: nn.Module, rows: Tensor | None, width: int):
        self._projection, self._rows, self._width = projection, rows, width
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        self._hooks: Sequence[Any] = (
            self._projection.register_forward_pre_hook(self._narrow),
            self._projection.register_forward_hook(self._widen),
        )

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _narrow(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if threading.get_ident() != self._thread:
            return None
        if self._rows is None:
            return (x[:, :1],)
        return (x.gather(1, self._rows[..., None].expand(-1, -1, x.shape[-1])),)

    def _widen(self, _: nn.Module, args: Any, out: Tensor) -> Tensor:
        if threading.get_ident() != self._thread:
            return out
        if self._rows is None:
            return out.expand(-1, self._width, -1)
        full = out.new_zeros(out.shape[0], self._width, out.shape[-1])
        return full.scatter(1, self._rows[..., None].expand_as(out), out)
