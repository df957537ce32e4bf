"""The contract between methods and engines: what a method declares and returns is checked here, once.

What shapes and types tell is always checked, as it makes no device wait. What only values tell, such as a token that
is kept twice, is checked within `checked_values`, which tests and evaluations switch on, and so should the author of a
method.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from typing import Any, Final, get_args

import torch
from torch import Tensor

from foveate.core.ambient import neutral
from foveate.core.encoder import EncoderReducer
from foveate.core.errors import ContractError
from foveate.core.in_llm import InLlmReducer, LayerTokens, Unit
from foveate.core.probes import LayerAttention, LlmProbe, Members, Prior, Probe, Query
from foveate.core.reducer import Method, Positions, Reducer, Stage
from foveate.core.selection import Merge, Selection, SpanSelection
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens

_values: ContextVar[bool] = ContextVar("foveate_checked_values", default=False)
_OTHER_NAMES: Final = ("reads", "probes", "cues", "llm_probes", "need")
_FLAGS: Final = ("reads_grid", "query_aware", "adaptive", "trained", "guided", "video_only")
_MERGING: Final = (None, "encoder", "features", "embeddings")


@contextmanager
def checked_values() -> Iterator[None]:
    """Check what methods return to the last value, on this thread; each check waits for the device.

    Examples
    --------
    >>> with checked_values(), foveate.attach(model, MyMethod(keep=64)):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    token = _values.set(True)
    try:
        yield
    finally:
        _values.reset(token)


@neutral()
def selected(method: Any, tokens: VisualTokens) -> Selection:
    """Let a method before the LLM decide, and check what it returns.

    Parameters
    ----------
    method
        A `Reducer`, or a chain, whose parts are checked one by one.

    Raises
    ------
    ContractError
        If it is no selection of these tokens, or keeps another number of them than the budget says.
    """
    chosen = _selection(method, tokens)
    if isinstance(method, Reducer):
        for span, own in zip(tokens.spans, chosen, strict=True):
            due, came = method.count(span), len(own)
            if came > due or (came < due and not method.adaptive):
                raise ContractError(
                    f"{method.name} keeps {came} of the {sum(map(len, span.crops))} tokens of a span, where "
                    f"keep={method.keep!r} is due {'at most ' * method.adaptive}{due}: return as many, or declare "
                    "adaptive = True if the budget is a bound"
                )
    return chosen


@neutral()
def selected_inside(method: InLlmReducer, tokens: LayerTokens) -> Selection:
    """Let a method decide at a boundary inside the LLM, and check what it returns.

    Raises
    ------
    ContractError
        If it is no selection of these tokens, or leaves another number of them than `InLlmReducer.counts` says.
    """
    chosen = _selection(method, tokens)
    for due, span, own in zip(tokens.counts, tokens.spans, chosen, strict=True):
        came, due = len(own), min(due, len(span))
        if came < due or (came > due and not method.adaptive):
            raise ContractError(
                f"{method.name} leaves {came} of {len(span)} tokens in front of layer {tokens.boundary}, where "
                f"counts() is due {'at least ' * method.adaptive}{due}: leave as many, or declare adaptive = True if "
                "this is a bound"
            )
    return chosen


def _selection(method: Any, tokens: VisualTokens) -> Selection:
    try:
        chosen = method.select(tokens)
    except ContractError as error:  # of what `pick` returns, where nobody knows whose it is
        raise ContractError(f"{method.name}: {error}") from None
    if not isinstance(chosen, Selection):
        raise ContractError(
            f"{method.name}.select returns {described(chosen)}, and not a Selection: return tokens.per_crop(...), "
            "per_crop_merge(...), or Selection((SpanSelection(...), ...))"
        )
    if len(chosen) != len(tokens.spans):
        raise ContractError(
            f"{method.name} returns a selection of {len(chosen)} spans, but {len(tokens.spans)} are due: one "
            "SpanSelection per span, in their order"
        )
    for span, own in zip(tokens.spans, chosen, strict=True):
        _check_span(method, span, own)
    return chosen


def _check_span(method: Any, span: Span, own: SpanSelection) -> None:
    if not isinstance(own, SpanSelection):
        raise ContractError(f"{method.name}: a selection is made of SpanSelection, not of {described(own)}")
    if (own.length, own.sample, own.kind) != (len(span), span.sample, span.kind):
        raise ContractError(
            f"{method.name} returns the selection of a span of length {own.length}, sample {own.sample} and kind "
            f"{own.kind!r}, where length {len(span)}, sample {span.sample} and kind {span.kind!r} are due"
        )
    _check_vector(f"{method.name}: kept", own.kept, torch.long)
    if len(own) > len(span):
        raise ContractError(f"{method.name} keeps {len(own)} tokens of a span of {len(span)}")
    if own.merge is not None:
        if method.merges is None:
            raise ContractError(
                f"{method.name} merges tokens, but declares merges = None: set merges = 'features' to merge before the "
                "projector, or 'embeddings' behind it"
            )
        _check_merge(method.name, own.merge)
    if _values.get():
        _check_values(method, span, own)


def _check_vector(what: str, value: Any, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype != dtype:
        raise ContractError(f"{what} is a tensor [K] of {dtype}, not {described(value)}")


def _check_merge(name: str, merge: Merge) -> None:
    _check_vector(f"{name}: the target of a merge", merge.target, torch.long)
    _check_vector(f"{name}: the source of a merge", merge.source, torch.long)
    _check_vector(f"{name}: the weight of a merge", merge.weight, torch.float32)
    if not len(merge.target) == len(merge.source) == len(merge.weight):
        raise ContractError(
            f"{name}: a merge has as many targets as sources and weights, not {len(merge.target)}, {len(merge.source)} "
            f"and {len(merge.weight)}"
        )


def _check_values(method: Any, span: Span, own: SpanSelection) -> None:
    name = method.name
    kept = own.kept.tolist()
    if kept and not 0 <= min(kept) <= max(kept) < len(span):
        raise ContractError(f"{name} keeps positions {min(kept)} to {max(kept)} of a span of {len(span)} tokens")
    if any(b <= a for a, b in pairwise(kept)):
        raise ContractError(f"{name} keeps a token twice, or not in order: positions ascend, and are distinct; {kept}")
    # Inside the LLM, those of the family's crops are there for good; see `InLlmReducer.unit`.
    if isinstance(method, Reducer) and (strange := sorted({*kept} & {*span.separators().tolist()})):
        raise ContractError(
            f"{name} keeps the separators {strange}, which no method chooses from: leave them to the engine"
        )
    if own.merge is not None:
        target, source, weight = own.merge.target, own.merge.source, own.merge.weight
        if sorted({*target.tolist()}) != list(range(len(kept))):
            raise ContractError(f"{name}: each of the {len(kept)} kept tokens is the target of a merge, and none else")
        if len(source) and not 0 <= int(source.min()) <= int(source.max()) < len(span) + own.extra:
            raise ContractError(
                f"{name} merges from positions {int(source.min())} to {int(source.max())}, but there are "
                f"{len(span) + own.extra} rows"
            )
        if not bool(weight.isfinite().all()):
            raise ContractError(f"{name} merges with weights that are no finite numbers")


def described(value: Any) -> str:
    """Return what a value is, in a few words."""
    if isinstance(value, Tensor):
        kind = "a mask" if value.dtype == torch.bool else "a tensor"
        return f"{kind} {list(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"


@cache
def check_declarations(cls: type[Method]) -> None:
    """Raise `ContractError` if a class of methods declares what makes no sense.

    What a class leaves to a property is not known before it has parameters; see `check_declarations_of`.
    """
    name = cls.__qualname__
    for other in _OTHER_NAMES:
        if any(other in vars(base) for base in cls.__mro__):
            raise ContractError(f"{name} declares {other!r}: what a method reads is called needs, a tuple of probes")
    if not isinstance(inspect.getattr_static(cls, "needs"), property):
        _check_probes(name, cls, cls.needs)
    stages = {Reducer: ("before_llm", "pixels"), EncoderReducer: ("encoder",), InLlmReducer: ("in_llm",)}
    for base in (EncoderReducer, InLlmReducer, Reducer):
        if issubclass(cls, base):
            _check_choice(name, "stage", cls.stage, stages[base])
            break
    _check_choice(name, "stage", getattr(cls, "stage", None), get_args(Stage))
    if cls.stage == "pixels" and not callable(getattr(cls, "plan", None)):
        raise ContractError(
            f"{name} acts on pixels and needs plan(span): the smaller grid of each crop, and its anchors"
        )
    _check_choice(name, "positions", cls.positions, get_args(Positions))
    _check_choice(name, "merges", inspect.getattr_static(cls, "merges"), _MERGING)
    if issubclass(cls, InLlmReducer):
        _check_choice(name, "unit", inspect.getattr_static(cls, "unit"), get_args(Unit))
    for flag in _FLAGS:
        _check_choice(name, flag, inspect.getattr_static(cls, flag), (True, False))
    fields = getattr(cls, "__dataclass_fields__", {})
    if unknown := [budget for budget in cls.budgets if budget not in fields]:
        raise ContractError(
            f"{name} declares the budgets {unknown}, but has no such parameters; it has {', '.join(fields)}"
        )


def check_declarations_of(method: Method) -> None:
    """Raise `ContractError` if a method with parameters, or one of its stages, declares what makes no sense."""
    for part in method.stages():
        check_declarations(type(part))
        _check_probes(part.name, type(part), part.needs)
        if isinstance(part, InLlmReducer):
            _check_hash(part)


def _check_hash(method: InLlmReducer) -> None:
    """The engine remembers by the method what it reads at each of its boundaries."""
    try:
        hash(method)
    except TypeError as error:
        raise ContractError(
            f"{method.name} has a parameter that cannot be part of a key ({error}): turn lists into tuples in "
            "__post_init__"
        ) from None


def _check_probes(name: str, cls: type[Method], needs: Any) -> None:
    if not isinstance(needs, tuple) or not all(isinstance(probe, Probe) for probe in needs):
        shown = described(needs) if not isinstance(needs, tuple) else f"({', '.join(map(_shown, needs))},)"
        raise ContractError(f"{name}: needs is a tuple of probes such as (probes.Features(),), not {shown}")
    inside = [probe for probe in needs if isinstance(probe, LlmProbe)]
    if issubclass(cls, Reducer) and inside:
        raise ContractError(
            f"{name} decides before the LLM, and cannot need {inside[0]!r}, which is read inside it: derive it from "
            "InLlmReducer"
        )
    if any(isinstance(probe, Members) for probe in needs):
        raise ContractError(f"{name}: the engine gives Members to methods inside the encoder by itself: leave it out")
    if any(isinstance(probe, Query) for probe in needs) and inspect.getattr_static(cls, "query_aware") is False:
        raise ContractError(f"{name} needs Query() and declares query_aware = False: leave the declaration out")
    if issubclass(cls, InLlmReducer):
        if cls.judges is InLlmReducer.judges and any(
            isinstance(probe, LayerAttention) and probe.rows == "judges" for probe in inside
        ):
            raise ContractError(f"{name} needs the attention of judges, and has no judges(visual, text) to choose them")
        if cls.prior is InLlmReducer.prior and Prior() in inside and not cls.guided:
            raise ContractError(
                f"{name} needs Prior(), and has no prior(tokens) to make it: write it, or set guided = True"
            )


def _shown(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)


def _check_choice(name: str, what: str, value: Any, allowed: Sequence[Any]) -> None:
    # A property, and a parameter of that name, say it for each instance.
    if isinstance(value, property) or inspect.ismemberdescriptor(value):
        return
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ContractError(f"{name}: {what} is one of {', '.join(map(repr, allowed))}, not {value!r}")
