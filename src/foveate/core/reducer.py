"""Methods: what all of them share, and those that decide before the language model."""

from __future__ import annotations

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from foveate.core import budget
from foveate.core.budget import Budget, ByKind, Coverage, Keep
from foveate.core.crops import CropBatch, Groups
from foveate.core.errors import BudgetError
from foveate.core.fields import check_fields
from foveate.core.probes import Probe
from foveate.core.selection import Merging, Selection, SpanSelection
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens

Stage: TypeAlias = Literal["pixels", "encoder", "before_llm", "in_llm", "projector"]
Positions: TypeAlias = Literal["original", "compact"]

ENTRY_POINTS = "foveate.reducers"


class ModelFamily(Protocol):
    """What a method may ask of the family of the model that it runs on."""

    name: ClassVar[str]
    two_way: ClassVar[bool]
    """Whether the tokens of an image see each other in the LLM in both directions."""

    def projector(self, model: Any) -> nn.Module:
        """Return the module between the vision encoder and the LLM."""


def _declared_name(cls: type) -> str:
    """Return the name of the entry point that names a class of another package, or else the class's in lower case."""
    if not cls.__module__.startswith("foveate."):
        for point in entry_points(group=ENTRY_POINTS):
            if point.value.replace(" ", "") == f"{cls.__module__}:{cls.__qualname__}":
                return point.name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


@dataclass(frozen=True)
class Method(ABC):
    """What methods of all stages share.

    A method is a frozen dataclass and so is its own configuration: its `repr` goes into result files, and `save`
    writes it as JSON. What a class declares beside its parameters is the same for all its instances, unless it is
    a property of the class.

    Parameters
    ----------
    keep
        The budget: a count, a ratio, a `Budget`, a list with one budget per image of a prompt, or budgets by kind.
        `None` for methods that have another way to state one, or none.
    """

    keep: Keep | None

    name: ClassVar[str]
    """Name in the registry; set by `register`."""
    stage: ClassVar[Stage]
    trained: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    """Whether it ranks tokens by scores of another model, so that `foveate.guide` runs it with two."""
    paper: ClassVar[str] = ""
    complexity: ClassVar[str] = ""
    """Cost of `select` per crop of N tokens of width C, T of them kept, such as ``"O(N^2 C)"``."""
    budgets: ClassVar[tuple[str, ...]] = ("keep",)
    """Parameters of which one states the budget; empty if the method has none."""
    video_only: ClassVar[bool] = False
    """Whether the method leaves images alone."""
    positions: ClassVar[Positions] = "compact"
    """Position ids that the paper gives the kept tokens."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a class its name before it is registered, as when the module of a plugin is imported by itself."""
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = _declared_name(cls)

    def __post_init__(self) -> None:
        check_fields(self.name, self, ("keep", *self.budgets))
        if self.keep is None:
            return
        budget.check(self.keep)
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))
        elif isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", ByKind(self.keep))

    @property
    def needs(self) -> tuple[Probe, ...]:
        """Probes that the method reads; a property of classes whose parameters have a say in it."""
        return ()

    @property
    def query_aware(self) -> bool:
        """Whether the text of the prompt has a say in what is kept, so that each question needs a decision."""
        return self.guided or any(probe.query_aware for probe in all_needs(self))

    @property
    def adaptive(self) -> bool:
        """Whether `select` decides how many tokens stay, so that `keep` is a bound; a parameter of some methods."""
        return False

    @property
    def merges(self) -> Merging:
        """Of what kept tokens are combinations: features before the projector, or embeddings; `None` if of nothing."""
        return None

    @property
    def reads_grid(self) -> bool:
        """Whether `select` needs the rows and columns of tokens."""
        return False

    def stages(self) -> tuple[Method, ...]:
        """Return the methods of a single stage that this one is made of, in the order in which they act."""
        return (self,)

    def coverages(self) -> tuple[Coverage, ...]:
        """Return the adaptive budgets in use, which need the saliency of an image."""
        keeps = self.keep.values() if isinstance(self.keep, Mapping) else self.keep
        listed = keeps if isinstance(keeps, Iterable) else (keeps,)
        return tuple(budget for budget in listed if isinstance(budget, Coverage))

    def check(self, model: Any, family: ModelFamily) -> None:  # noqa: B027
        """Raise `FoveateError` if the method was made for another model. Called often: remember what is costly."""

    def check_images(self, count: int) -> None:
        """Raise `BudgetError` if a list has more budgets than the only prompt that there is has images and videos."""
        for stage in self.stages():
            if isinstance(stage.keep, Sequence) and len(stage.keep) > count:
                raise BudgetError(
                    f"keep={list(stage.keep)!r} names {len(stage.keep)} budgets, but the prompt has {count} "
                    f"{'image' if count == 1 else 'images'}: give one budget per image"
                )

    @abstractmethod
    def keeps_all(self, spans: Sequence[Span]) -> bool:
        """Return whether the budget covers every token of all spans, so that nothing needs to run."""

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-compatible data that `foveate.load_reducer` accepts."""
        return {"method": self.name, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Method:
        """Build the method from the parameters that `to_dict` gave; their values are what they were."""
        return cls(**arguments)

    def save(self, path: str | Path) -> None:
        """Write the configuration as a JSON file that `foveate.load_reducer` reads."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Reducer(Method):
    """A method that decides before the language model: turns visual tokens and probes into a `Selection`.

    The author of one subclasses this, declares what it needs, and writes `select`.
    """

    keep: Keep

    stage: ClassVar[Stage] = "before_llm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None:
            budget.check(self.keep)  # raises

    @abstractmethod
    def select(self, tokens: VisualTokens) -> Selection:
        """Decide which tokens of each span stay. Touches nothing else.

        Compiles with ``torch.compile(fullgraph=True, dynamic=False)``, or the method's docstring says why not.
        """

    def count(self, span: Span) -> int:
        """Return how many tokens of a span stay; of adaptive methods, at most."""
        counts, sizes = span.budget(self.keep), list(map(len, span.crops))
        if len(counts) == len(sizes):
            return sum(map(min, counts, sizes))
        return min(sum(counts), sum(sizes))  # one budget for all crops together

    def keeps_all(self, spans: Sequence[Span]) -> bool:
        if self.coverages():
            return False
        return all(sum(s.budget(self.keep)) >= sum(map(len, s.crops)) for s in spans)


@dataclass(frozen=True)
class CropReducer(Reducer):
    """A reducer that chooses among the tokens of each crop; its author writes `pick`."""

    @abstractmethod
    def pick(self, crops: CropBatch, count: int) -> Tensor:
        """Choose tokens in crops of equal size and budget.

        Parameters
        ----------
        crops
            B crops of N tokens.
        count
            The budget T of each, less than N.

        Returns
        -------
        Tensor
            ``[B, T]`` int64: distinct tokens of each crop, in any order.
        """

    def select(self, tokens: VisualTokens) -> Selection:
        return tokens.per_crop(self.keep, self.pick)


@dataclass(frozen=True)
class CropMerger(Reducer):
    """A reducer that merges the tokens of each crop; its author writes `pick`, and says in `merges` what is merged."""

    @abstractmethod
    def pick(self, crops: CropBatch, count: int) -> Groups:
        """Merge the tokens of crops of equal size and budget, N of them into `count`; see `CropReducer.pick`."""

    def select(self, tokens: VisualTokens) -> Selection:
        return tokens.per_crop_merge(self.keep, self.pick)


def declared(method: Method | type[Method], name: str) -> Any:
    """Return what a method declares under a name; of a class that leaves this to its parameters, what `Method` says."""
    value = getattr(method, name)
    if not isinstance(value, property):
        return value
    if name == "query_aware":
        return method.guided or any(probe.query_aware for probe in declared(method, "needs"))
    return {"needs": (), "adaptive": False, "merges": None, "reads_grid": False}[name]


def all_needs(method: Method) -> tuple[Probe, ...]:
    """Return everything that a method reads, in all its stages."""
    return tuple(dict.fromkeys(probe for part in method.stages() for probe in part.needs))


def identity(spans: Sequence[Span]) -> Selection:
    """Return the selection that keeps every token of the given spans."""
    return Selection(tuple(SpanSelection(len(s), torch.arange(len(s)), sample=s.sample, kind=s.kind) for s in spans))


def _plain(value: Any) -> Any:
    if isinstance(value, Coverage):
        return {"coverage": value.value, "per": value.per, "least": value.least, "most": value.most}
    if isinstance(value, Budget):
        return {"budget": value.value, "per": value.per}
    if isinstance(value, Method):
        return value.to_dict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
