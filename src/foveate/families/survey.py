"""A pass through a vision tower that nobody has described, which shows how to read its attention.

The layers are those whose attention goes through the `AttentionInterface` of `transformers`. Which token a patch ends
in is found by following gradients from the tokens back to the tower; nothing is concluded from names or sizes. The same
pass checks, layer by layer, that what is read explains what the attention returned.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core.ambient import neutral
from foveate.families.taps import Taps, twin, visible_keys
from foveate.families.tracing import flow, touched

_ROWS = 16
"""How many attention rows of a call are checked."""
_LOUDNESS = 0.1
"""How large the noise is that stands for outputs of layers: small, for softmaxes behind them to be soft."""

Lead = Literal["none", "first", "last"]


@dataclass(frozen=True, eq=False)
class Tower:
    """Layers of a vision tower whose attention can be read, and the model whose configuration they follow."""

    root: PreTrainedModel
    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]

    def whole_layers(self) -> list[int] | None:
        """Return the layers that attend to whole pictures by the configuration, where others attend within windows."""
        config: Any = self.root.config
        if (indices := getattr(config, "fullatt_block_indexes", None)) is not None:
            return sorted(indices)
        kinds = getattr(config, "layer_types", None)
        whole = [i for i, kind in enumerate(kinds or ()) if "full" in kind]
        return whole if kinds and len(whole) < len(kinds) else None


def towers(model: Any) -> list[Tower]:
    """Return the stacks of layers outside of the LLM whose attention goes through the `AttentionInterface`."""
    llm = set(model.get_decoder().modules())
    found: list[Tower] = []
    for stack in model.modules():
        if not isinstance(stack, nn.ModuleList) or not len(stack) or stack in llm:
            continue
        inside = [[m for m in layer.modules() if _calls_interface(m)] for layer in stack]
        if any(len(modules) != 1 for modules in inside):
            continue
        attention = tuple(modules[0] for modules in inside)
        config: Any = attention[0].config
        roots = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is config]
        if roots := [root for root in roots if attention[0] in set(root.modules())]:
            found.append(Tower(roots[-1], tuple(stack), attention))  # modules come before those inside them
    return found


def _calls_interface(module: nn.Module) -> bool:
    module_class: Any = type(module)
    return hasattr(module, "config") and _names_interface(module_class)


@cache
def _names_interface(module_class: Any) -> bool:
    code = getattr(inspect.unwrap(module_class.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


@dataclass(frozen=True, eq=False)
class Survey:
    """What a pass has shown of a tower, for one layout of the inputs.

    Attributes
    ----------
    tower
        Which of the model's stacks it is.
    read
        Index of the last layer whose output the tokens are made of.
    first
        Index of the first layer whose positions are those of layer `read`.
    lead
        Where the ``[CLS]`` token of each sequence is.
    windows
        Whether some layers attend within parts of what others attend to.
    positions
        Positions of the layer, those of ``[CLS]`` tokens aside.
    members
        ``[M, G]`` int64 on the CPU: the positions that each token is made of, filled up with -1.
    """

    tower: int
    read: int
    first: int
    lead: Lead
    windows: bool
    positions: int
    members: Tensor

    def to_tokens(self, values: Tensor) -> Tensor:
        """Average what was read of positions ``[P, ...]`` over those of each token, ``[M, ...]``."""
        members = self.members.to(values.device)
        there = (members >= 0).view(*members.shape, *[1] * (values.dim() - 1))
        rows = values[members.clamp(min=0)]
        return torch.where(there, rows, 0).sum(dim=1) / there.sum(dim=1)


class Unreadable(Exception):  # noqa: N818  becomes an error that names the model
    """Why the tokens of a model cannot be told by the attention of its encoder."""


def surveyed(
    stacks: Sequence[Tower],
    inputs: Mapping[str, Any],
    run: Callable[[Mapping[str, Any]], Any],
    rows_of: Callable[[Any], Tensor],
) -> Survey:
    """Run a model's encoder and projector and return what that shows; see `generic_tower.look`.

    Raises
    ------
    Unreadable
        If the attention does not tell the tokens apart.
    """
    tracer = _Tracer(stacks)
    with torch.inference_mode(False), torch.no_grad(), _evaluating(stacks), tracer.listening():
        # What was made in inference mode can have no part in gradients.
        own = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in inputs.items()}
        try:
            rows = rows_of(run(own))
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            raise Unreadable("it changes the outputs of its layers in place") from error
    with torch.inference_mode(False), neutral():
        return tracer.survey(rows)


@contextmanager
def _evaluating(stacks: Sequence[Tower]) -> Iterator[None]:
    """Keep dropout and gradient checkpointing, which there are in training alone, out of a pass."""
    trained = [module for tower in stacks for module in tower.root.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


class _Tracer(Taps):
    """Follows the positions of a pass through the tower that runs first.

    Layers run without gradients, and what is between and behind them with gradients: those of the tokens then end at
    the outputs of the layers that they are made of, and those of the queries at what goes into their layer.
    """

    def __init__(self, stacks: Sequence[Tower]):
        super().__init__({}, 0)
        self._stacks, self._thread = stacks, threading.get_ident()
        self._tower: Tower | None = None
        self._inputs: dict[int, list[Tensor]] = {}
        self._outputs: dict[int, list[Tensor]] = {}
        self._lengths: dict[int, list[int]] = {}
        self._linked: dict[int, bool] = {}
        self._ordered: dict[tuple[Any, ...], bool] = {}
        self._queries: list[Tensor] = []
        self._running: int | None = None
        self._wrong: dict[int, str] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        hooks = []
        with ExitStack() as stack:
            for tower in self._stacks:
                stack.enter_context(twin(tower.root, self))
                for i, layer in enumerate(tower.layers):
                    hooks.append(layer.register_forward_pre_hook(self._entering(tower, i), with_kwargs=True))
                    hooks.append(layer.register_forward_hook(self._leaving(tower, i)))
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def _entering(self, tower: Tower, i: int) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != self._thread or (self._tower or tower) is not tower:
                return
            self._tower, self._running, self._queries = tower, i, []
            states = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            before = self._outputs[i - 1][-1] if i - 1 in self._outputs else None
            self._linked[i] = self._linked.get(i, True) and before is not None and _same(before, states)
            if not states.requires_grad:
                states.requires_grad_()
            self._inputs.setdefault(i, []).append(states)
            torch.set_grad_enabled(True)

        return enter

    def read(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        bounds: Tensor | None,
        mask: Any = None,
        out: Tensor | None = None,
    ) -> None:
        i = self._running
        if self._tower is None or i is None or module is not self._tower.attention[i]:
            return
        torch.set_grad_enabled(False)
        self._queries.append(query)
        with neutral():
            start, heads = 0, (query.detach(), key.detach(), value.detach())
            for q, k, v, seen in sequences(*heads, bounds, mask):
                self._lengths.setdefault(i, []).extend([q.shape[2]] * len(q))
                if q.shape[2] != k.shape[2] or out is None:
                    self._wrong[i] = "its queries are not those of the patches that they attend to"
                elif not _explains(q, k, v, scaling, seen, out[:, start : start + q.shape[2]]):
                    self._wrong[i] = "its attention is more than queries, keys and a mask tell"
                start += q.shape[2]

    def _leaving(self, tower: Tower, i: int) -> Callable[..., None]:
        def leave(_: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() != self._thread or self._tower is not tower:
                return
            torch.set_grad_enabled(True)
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                self._wrong[i] = "its attention does not go through the AttentionInterface"
            else:
                states.requires_grad_()
                self._check_order(i, states)
            self._outputs.setdefault(i, []).append(states)
            self._running, self._queries = None, []
            for done in (i - 1, *[i] * (i == len(tower.layers) - 1)):
                for x in self._outputs.get(done, [])[-1:]:
                    _fill(x)

        return leave

    def _check_order(self, i: int, states: Tensor) -> None:
        """Check once per kind of call that queries come in the order of the layer's positions."""
        entered, queries = self._inputs[i][-1], self._queries
        kind = (entered.shape, states.shape, tuple(q.shape for q in queries))
        if kind not in self._ordered:
            rows = [q.transpose(1, 2).flatten(2).flatten(0, 1) for q in queries]
            self._ordered[kind] = entered.shape == states.shape and _in_order(rows, entered)
        if not self._ordered[kind]:
            self._wrong[i] = "its attention sees the patches in another order, or other ones, than its layers"

    def survey(self, rows: Tensor) -> Survey:
        """Conclude from the tokens ``[M, D]`` that the pass made."""
        tower = self._tower
        if tower is None or not self._outputs or not rows.requires_grad:
            raise Unreadable("its tokens are not made of the outputs of such layers")
        used = [i for i, x in self._outputs.items() if any(touched(rows, x))]
        if not used:
            raise Unreadable("its tokens are not made of the outputs of such layers")
        read = max(used)
        if (wrong := self._wrong.get(read)) is not None:
            raise Unreadable(wrong)
        way = flow(rows, self._outputs[read])
        if way.mixes:
            raise Unreadable("a resampler, cross-attention or an overlapping filter makes each of several tokens")
        lengths = self._lengths[read]
        lead = self._class_token(tower, way.row, lengths)
        row = way.row
        if lead != "none":
            ends = torch.tensor(lengths).cumsum(0)
            there = ends - 1 if lead == "last" else ends - torch.tensor(lengths)
            others = torch.ones(len(row), dtype=torch.bool)
            others[there] = False
            row = row[others]
        counts = torch.bincount(row[row >= 0], minlength=len(rows))
        if not bool(counts.all()):
            raise Unreadable(f"{int((counts == 0).sum())} of {len(rows)} tokens are made of no patch (separators)")
        first = read
        while first and self._linked.get(first) and first - 1 not in self._wrong and first - 1 in self._outputs:
            first -= 1
        windows = len({tuple(self._lengths[i]) for i in range(first, read + 1)}) > 1
        return Survey(self._stacks.index(tower), read, first, lead, windows, len(row), _members(row, counts))

    def _class_token(self, tower: Tower, row: Tensor, lengths: Sequence[int]) -> Lead:
        """Find a ``[CLS]`` token: a vector of the tower's own by name, at an end of each sequence, in no token."""
        own = [name.rpartition(".")[2] for name, x in tower.root.named_parameters() if x.squeeze().dim() == 1]
        if not any("cls" in name or "class" in name for name in own):
            return "none"
        free = [(part < 0).nonzero().flatten().tolist() for part in torch.split(row, list(lengths))]
        if all(places == [0] for places in free):
            return "first"
        return "last" if all(places == [n - 1] for places, n in zip(free, lengths, strict=True)) else "none"


def _fill(states: Tensor) -> None:
    """Put noise in the place of outputs that no layer is to read any more.

    What an image shows must not decide what its tokens are made of, as where attention among a token's patches leaves
    one of them aside.
    """
    generator = torch.Generator(states.device).manual_seed(0)
    noise = torch.randn(states.shape, generator=generator, device=states.device, dtype=torch.float32)
    states.data.copy_(_LOUDNESS * noise)  # what is saved for gradients may change: where they lead does not


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same values in the same order, be it by another name."""
    alike = (one.shape, one.stride()) == (other.shape, other.stride())
    return alike and one.data_ptr() == other.data_ptr()


def _in_order(rows: Sequence[Tensor], entered: Tensor) -> bool:
    with torch.enable_grad():
        joined = torch.cat(list(rows)) if rows else entered.new_empty(0)
    if not joined.requires_grad or len(joined) != entered.shape[:-1].numel():
        return False
    with neutral():
        way = flow(joined, [entered])
    return not way.mixes and torch.equal(way.row, torch.arange(len(way.row)))


def _explains(query: Tensor, key: Tensor, value: Tensor, scaling: float, seen: Tensor | None, out: Tensor) -> bool:
    """Return whether some rows of the attention ``[B, S, H, d]`` that a call returned follow from what it got."""
    size = query.shape[2]
    rows = torch.linspace(0, size - 1, min(_ROWS, size), device=query.device).round().long()
    logits = torch.matmul(query.index_select(2, rows).float(), key.float().transpose(-1, -2)) * scaling
    kept = torch.ones_like(logits[:, :1], dtype=torch.bool)
    if seen is not None:
        kept = seen.expand(-1, -1, size, -1).index_select(2, rows)
        logits = logits.masked_fill(~kept, torch.finfo(logits.dtype).min)
    due = torch.matmul(logits.softmax(dim=-1), value.float()).transpose(1, 2)
    if not bool(due.isfinite().all()):
        return True  # `flow` says so
    # What queries of padding see differs from one implementation to the next, and is read by nobody.
    shown = kept.any(dim=1).any(dim=-1)[..., None, None]
    if seen is not None:
        shown = shown & seen.any(dim=2)[:, 0].index_select(1, rows)[..., None, None]
    error = ((out.index_select(1, rows).float() - due) * shown).norm()
    return bool(error <= (1e-3 if out.dtype == torch.float32 else 3e-2) * (due * shown).norm())


def _members(row: Tensor, counts: Tensor) -> Tensor:
    """List the positions of each row, ascending."""
    order = row.argsort(stable=True)[int((row < 0).sum()) :]
    starts = counts.cumsum(0) - counts
    members = torch.full((len(counts), int(counts.max())), -1)
    owners = row[order]
    members[owners, torch.arange(len(order)) - starts[owners]] = order
    return members


def sequences(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, mask: Any
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Cut one call apart where queries see no further: at bounds, or between the blocks of a mask.

    Yields queries, keys and values ``[B, H, S, d]``, as many of each, and which keys are seen; `None` if all.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    seen = None if bounds is not None else visible_keys(mask)
    seen = None if seen is None or bool(seen.all()) else seen
    lengths = None if bounds is None else bounds.diff().tolist()
    if seen is not None and len(query) == 1 and (blocks := _blocks(seen)) is not None:
        seen, lengths = None, blocks
    if lengths is None:
        yield query, key, value, seen
    else:
        parts = (torch.split(x, lengths, dim=2) for x in (query, key, value))
        yield from ((q, k, v, None) for q, k, v in zip(*parts, strict=True))


def _blocks(seen: Tensor) -> list[int] | None:
    """Return the lengths of the blocks along the diagonal of a mask ``[1, 1, S, S]``; `None` if it is another one."""
    square = seen[0, 0]
    if seen.shape[1] != 1 or square.shape[0] != square.shape[1] or not bool(square.any(dim=1).all()):
        return None
    start = square.int().argmax(dim=1)  # the first key that each query sees
    if not bool((square == (start[:, None] == start)).all()):
        return None
    lengths: list[int] = torch.unique_consecutive(start, return_counts=True)[1].tolist()
    return lengths
