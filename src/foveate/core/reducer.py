"""Reducers: the base class of all methods, their registry, and chains of them."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import inspect
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch

from foveate.core import budget
from foveate.core.budget import Budget, ByKind, Coverage, Keep
from foveate.core.coverage import with_coverage
from foveate.core.errors import BudgetError, FoveateError, InputError, UnknownNameError
from foveate.core.probes import Probe
from foveate.core.selection import Merging, Selection, SpanSelection
from foveate.core.tokens import Span, VisualTokens

if TYPE_CHECKING:
    from foveate.families import Family

Stage: TypeAlias = Literal["pixels", "encoder", "before_llm", "in_llm", "projector"]
Positions: TypeAlias = Literal["original", "compact"]

ENTRY_POINTS = "foveate.reducers"


@dataclass(frozen=True)
class Reducer(ABC):
    """A method: turns visual tokens and probes into a `Selection`.

    A reducer is a frozen dataclass and so is its own configuration: its `repr` goes into result files, and `save`
    writes it as JSON. The author of a method subclasses it, declares the class variables, and writes `select`.

    Parameters
    ----------
    keep
        The budget: a count, a ratio, a `Budget`, a list with one budget per image of a prompt, or budgets by kind.
    """

    keep: Keep

    name: ClassVar[str]
    """Name in the registry; set by `register`."""
    stage: ClassVar[Stage] = "before_llm"
    needs: ClassVar[tuple[Probe, ...]] = ()
    """Probes that `select` reads."""
    reads_grid: ClassVar[bool] = False
    """Whether `select` needs the rows and columns of tokens."""
    query_aware: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    """Whether it ranks tokens by scores of another model, so that `foveate.guide` runs it with two."""
    merges: ClassVar[Merging] = None
    """Whether kept tokens are combinations of several, and of what: features before the projector, or embeddings."""
    paper: ClassVar[str] = ""
    complexity: ClassVar[str] = ""
    """Cost of `select` per crop of N tokens of width C, T of them kept, such as ``"O(N^2 C)"``."""
    budgets: ClassVar[tuple[str, ...]] = ("keep",)
    """Parameters of which one states the budget; empty if the method has none."""
    video_only: ClassVar[bool] = False
    """Whether the method leaves images alone."""
    positions: ClassVar[Positions] = "compact"
    """Position ids that the paper gives the kept tokens."""

    def __post_init__(self) -> None:
        check_fields(self)
        budget.check(self.keep)
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))
        elif isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", ByKind(self.keep))

    @abstractmethod
    def select(self, tokens: VisualTokens) -> Selection:
        """Decide which tokens of each span stay. Touches nothing else.

        Compiles with ``torch.compile(fullgraph=True, dynamic=False)``, or the method's docstring says why not.
        """

    def probes(self) -> tuple[Probe, ...]:
        """Return the probes that this configuration reads."""
        return self.needs

    def cues(self) -> tuple[Probe, ...]:
        """Return everything that the method reads, in all its stages."""
        return tuple(dict.fromkeys(probe for part in self.stages() for probe in part.probes()))

    @property
    def adaptive(self) -> bool:
        """Whether `select` decides how many tokens stay, so that `keep` is a bound; a parameter of some methods."""
        return False

    def stages(self) -> tuple[Reducer, ...]:
        """Return the methods of a single stage that this one is made of, in the order in which they act."""
        return (self,)

    def coverages(self) -> tuple[Coverage, ...]:
        """Return the adaptive budgets in use, which need the saliency of an image."""
        keeps = self.keep.values() if isinstance(self.keep, Mapping) else self.keep
        listed = keeps if isinstance(keeps, Iterable) else (keeps,)
        return tuple(budget for budget in listed if isinstance(budget, Coverage))

    def check(self, model: Any, family: Family) -> None:  # noqa: B027
        """Raise `FoveateError` if the method was made for another model. Called often: remember what is costly."""

    def check_images(self, count: int) -> None:
        """Raise `BudgetError` if a list has more budgets than the only prompt that there is has images and videos."""
        for stage in self.stages():
            if isinstance(stage.keep, Sequence) and len(stage.keep) > count:
                raise BudgetError(
                    f"keep={list(stage.keep)!r} names {len(stage.keep)} budgets, but the prompt has {count} "
                    f"{'image' if count == 1 else 'images'}: give one budget per image"
                )

    def keeps_all(self, spans: Sequence[Span]) -> bool:
        """Return whether the budget covers every token of all spans, so that nothing needs to run."""
        if self.coverages():
            return False
        return all(sum(s.budget(self.keep)) >= sum(map(len, s.crops)) for s in spans)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-compatible data that `load_reducer` accepts."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"method": self.name, **fields}

    def save(self, path: str | Path) -> None:
        """Write the configuration as a JSON file that `load_reducer` reads."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


_KINDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    NoneType: "None",
}


@functools.cache
def _kinds(cls: type[Reducer]) -> dict[str, tuple[Any, ...]]:
    """Return what fields take whose annotations are made of plain types and literals; budgets are checked elsewhere."""
    try:
        hints = get_type_hints(cls)
    except NameError:  # a name that was imported for type checkers alone
        return {}
    found = {}
    for name in {f.name for f in dataclasses.fields(cls)} - {"keep", *cls.budgets}:
        kinds = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
        if all(kind in _KINDS or get_origin(kind) is Literal for kind in kinds):
            found[name] = kinds
    return found


def check_fields(reducer: Reducer) -> None:
    """Raise `FoveateError` for the first parameter that is of another type than its annotation says."""
    for name, kinds in _kinds(type(reducer)).items():
        value = getattr(reducer, name)
        if not any(_fits(value, kind) for kind in kinds):
            words = [w for k in kinds for w in ([_KINDS[k]] if k in _KINDS else map(repr, get_args(k)))]
            allowed = " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
            raise FoveateError(
                f"{getattr(reducer, 'name', type(reducer).__name__)}: {name} is {allowed}, not {value!r}"
            )


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _plain(value: Any) -> Any:
    if isinstance(value, Coverage):
        return {"coverage": value.value, "per": value.per, "least": value.least, "most": value.most}
    if isinstance(value, Budget):
        return {"budget": value.value, "per": value.per}
    if isinstance(value, Reducer):
        return value.to_dict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _rich(value: Any) -> Any:
    if isinstance(value, dict):
        for key, make, others in (
            ("coverage", Budget.coverage, ("per", "least", "most")),
            ("budget", Budget, ("per",)),
        ):
            if key in value:
                further = {k: v for k, v in value.items() if k != key}
                if unknown := further.keys() - {*others}:
                    raise BudgetError(
                        f"a budget with {key!r} takes {', '.join(others)} beside it, not {', '.join(sorted(unknown))}"
                    )
                return make(value[key], **further)
        if "method" in value:
            return reducer_from_dict(value)
        return {k: _rich(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_rich(v) for v in value)
    return value


R = TypeVar("R", bound=type[Reducer])
_registry: dict[str, type[Reducer]] = {}


def register(name: str) -> Callable[[R], R]:
    """Register a reducer class under a name, as a class decorator.

    Raises
    ------
    FoveateError
        If the name is not lower case, is taken, or the class is no `Reducer` and frozen dataclass.
    """

    def decorate(cls: R) -> R:
        if name != name.lower() or not name.replace("_", "").replace("+", "").isalnum():
            raise FoveateError(f"a method name has lower-case letters, digits and '_': {name!r} does not")
        if not issubclass(cls, Reducer) or inspect.isabstract(cls):
            raise FoveateError(f"{cls.__qualname__} is no method: derive it from foveate.Reducer and write its select")
        if name in _registry and _origin(_registry[name]) != _origin(cls):
            raise FoveateError(f"the method name {name!r} is taken by {'.'.join(_origin(_registry[name]))}")
        if "__dataclass_params__" not in vars(cls) or not vars(cls)["__dataclass_params__"].frozen:
            raise FoveateError(f"put @dataclass(frozen=True) below @register({name!r}): a reducer is its configuration")
        cls.name = name
        _registry[name] = cls
        return cls

    return decorate


def _origin(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _all() -> dict[str, type[Reducer]]:
    import foveate.methods  # noqa: F401  registers the built-in methods

    for point in entry_points(group=ENTRY_POINTS):
        if (point.name, point.value) not in _seen_plugins:
            _seen_plugins.add((point.name, point.value))
            _add_plugin(point)
    return _registry


_seen_plugins: set[tuple[str, str]] = set()


def _add_plugin(point: EntryPoint) -> None:
    """Register a method of another package; one that cannot be used is left out with a warning that names it."""
    try:
        register(point.name)(point.load())
    except Exception as error:
        warnings.warn(f"the method {point.name!r} of {point.value!r} is left out: {error}", stacklevel=4)


def list_methods(pattern: str = "*") -> list[str]:
    """Return the names of all registered methods that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter(_all(), pattern))


def get_method(name: str) -> type[Reducer]:
    """Return the class registered under a name.

    Raises
    ------
    UnknownNameError
        If there is none; the message lists those there are.
    """
    methods = _all()
    if name not in methods:
        raise UnknownNameError.among("no method is called", name, sorted(methods))
    return methods[name]


def parameters_without_default(name: str) -> list[str]:
    """Return what a registered method must be given beside its budget."""
    fields = dataclasses.fields(get_method(name))
    return [f.name for f in fields if f.default is dataclasses.MISSING and f.name != "keep"]


def by_default(name: str) -> Reducer | type[Reducer]:
    """Return a registered method with its defaults at some budget, or its class if it takes more or another budget."""
    method = get_method(name)
    if method is Chain or parameters_without_default(name):
        return method
    try:
        return method(keep=0.5) if method.budgets else method()  # type: ignore[call-arg]
    except (FoveateError, ValueError):  # of another package
        return method


def reducer_from_dict(data: dict[str, Any]) -> Reducer:
    """Build a reducer from the data of `Reducer.to_dict`."""
    if not isinstance(data, dict) or "method" not in data:
        raise FoveateError('a reducer configuration is an object with the keys "method", "keep", ...')
    if not isinstance(data["method"], str):
        raise FoveateError(f'"method" is the name of a method, such as "vispruner", not {data["method"]!r}')
    cls = get_method(data["method"])
    arguments = {key: _rich(value) for key, value in data.items() if key != "method"}
    if cls is Chain:
        if set(arguments) != {"reducers"}:
            raise FoveateError("a chain has one parameter, its reducers: set the parameters of these")
        if not isinstance(arguments["reducers"], tuple):
            raise FoveateError(f"the reducers of a chain are a list, not {data['reducers']!r}")
        return Chain(*arguments["reducers"])
    try:
        return cls(**arguments)
    except FoveateError:  # some of which are TypeErrors
        raise
    except (TypeError, ValueError, LookupError, AttributeError, OSError) as error:  # also of another package's method
        raise FoveateError(_signature_help(cls, arguments, error)) from error


def load_reducer(method: str | Path | Reducer, **config: Any) -> Reducer:
    """Return a reducer from a registered name and its parameters, or from a JSON file that `Reducer.save` wrote.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    FoveateError
        If the file cannot be read or describes no method, or the method does not take these parameters.

    Examples
    --------
    >>> load_reducer("vispruner", keep=64)
    VisPruner(keep=64, important_ratio=0.5, step=8, order='similarity')
    """
    if isinstance(method, Reducer):
        return reducer_from_dict({**method.to_dict(), **config}) if config else method
    if isinstance(method, Path) or str(method).endswith(".json"):
        return reducer_from_dict({**_read(Path(method)), **config})
    return reducer_from_dict({"method": method, **config})


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the method from {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} does not describe a method: {error}") from error
    if not isinstance(data, dict):
        raise InputError(
            f'{str(path)!r} does not describe a method: it holds no object with the keys "method", "keep", ...'
        )
    return data


def _signature_help(cls: type[Reducer], given: dict[str, Any], error: Exception) -> str:
    known = [f.name for f in dataclasses.fields(cls)]
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    missing, unknown = [n for n in required if n not in given], [n for n in given if n not in known]
    if not missing and not unknown:
        values = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{cls.name} cannot use {values or 'its defaults'}: {error}"
    faults = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"does not know {', '.join(unknown)}"] * bool(unknown)
    return f"{cls.name} {' and '.join(faults)}; its parameters are: {', '.join(known)}"


@register("chain")
@dataclass(frozen=True, init=False, repr=False)
class Chain(Reducer):
    """Reducers one after the other, each on what the one before it has left.

    Its `select` does not compile to one graph: how many tokens of a crop are left to the next method depends on values.

    Examples
    --------
    >>> from foveate import Chain, VisPruner
    >>> Chain(VisPruner(keep=0.5), VisPruner(keep=32, important_ratio=0.0))  # doctest: +SKIP
    """

    reducers: tuple[Reducer, ...]

    complexity = "the sum over its reducers"

    def __init__(self, *reducers: Reducer):
        if not reducers or not all(isinstance(r, Reducer) for r in reducers):
            raise FoveateError("a chain is made of reducers: Chain(VisPruner(keep=0.5), ...)")
        before, inside = split(r for reducer in reducers for r in reducer.stages())
        if [r for reducer in reducers for r in reducer.stages()] != [*before, *inside]:
            raise FoveateError("methods that act inside the LLM come last in a chain")
        if len(before) > 1 and any(r.stage != "before_llm" for r in before):
            raise FoveateError(
                "methods of the stages 'pixels' and 'encoder' can be followed by methods that act inside the LLM only"
            )
        if any(r.merges for r in before[:-1]):
            raise FoveateError("a method that merges tokens can only be the last of a chain before the LLM")
        object.__setattr__(self, "reducers", reducers)
        object.__setattr__(self, "keep", reducers[-1].keep)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.reducers))})"

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, "reducers": [r.to_dict() for r in self.reducers]}

    def stages(self) -> tuple[Reducer, ...]:
        return tuple(r for reducer in self.reducers for r in reducer.stages())

    @property
    def merges(self) -> Merging:  # type: ignore[override]
        return self.reducers[-1].merges

    @property
    def reads_grid(self) -> bool:  # type: ignore[override]
        return any(r.reads_grid for r in self.reducers)

    def coverages(self) -> tuple[Coverage, ...]:
        return tuple(dict.fromkeys(budget for r in self.reducers for budget in r.coverages()))

    def probes(self) -> tuple[Probe, ...]:
        return tuple(dict.fromkeys(p for r in self.reducers for p in r.probes()))

    def check(self, model: Any, family: Family) -> None:
        for reducer in self.reducers:
            reducer.check(model, family)

    def keeps_all(self, spans: Sequence[Span]) -> bool:
        return all(r.keeps_all(spans) for r in self.reducers)

    def select(self, tokens: VisualTokens) -> Selection:
        chosen = self.reducers[0].select(tokens)
        for reducer in self.reducers[1:]:
            tokens = tokens.after(chosen)
            if budgets := reducer.coverages():
                tokens = with_coverage(tokens, budgets)  # a share of what is left
            chosen = reducer.select(tokens)
        return chosen


def split(stages: Iterable[Reducer]) -> tuple[tuple[Reducer, ...], tuple[Reducer, ...]]:
    """Tell the methods that act before the LLM from those that act inside it."""
    parts = list(stages)
    return tuple(r for r in parts if r.stage != "in_llm"), tuple(r for r in parts if r.stage == "in_llm")


def identity(spans: Sequence[Span]) -> Selection:
    """Return the selection that keeps every token of the given spans."""
    return Selection(tuple(SpanSelection(len(s), torch.arange(len(s)), sample=s.sample, kind=s.kind) for s in spans))


__all__ = ["Chain", "Reducer", "get_method", "list_methods", "load_reducer", "register"]
