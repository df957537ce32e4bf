"""Methods one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.author import Coverage, FoveateError, Method, ModelFamily, Selection, Span, VisualTokens, probes, register
from foveate.core.checks import selected
from foveate.core.coverage import with_coverage
from foveate.core.in_llm import split
from foveate.core.reducer import Stage, all_needs
from foveate.core.selection import Merging


@register("chain")
@dataclass(frozen=True, init=False, repr=False)
class Chain(Method):
    """Reducers one after the other, each on what the one before it has left.

    Its `select` does not compile to one graph: how many tokens of a crop are left to the next method depends on values.

    Examples
    --------
    >>> from foveate import Chain, VisPruner
    >>> Chain(VisPruner(keep=0.5), VisPruner(keep=32, important_ratio=0.0))  # doctest: +SKIP
    """

    reducers: tuple[Method, ...]

    stage: ClassVar[Stage] = "before_llm"
    complexity = "the sum over its reducers"

    def __init__(self, *reducers: Method):
        if not reducers or not all(isinstance(r, Method) for r in reducers):
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

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Chain:
        if set(arguments) != {"reducers"}:
            raise FoveateError("a chain has one parameter, its reducers: set the parameters of these")
        if not isinstance(arguments["reducers"], tuple):
            raise FoveateError(f"the reducers of a chain are a list, not {arguments['reducers']!r}")
        return cls(*arguments["reducers"])

    def stages(self) -> tuple[Method, ...]:
        return tuple(r for reducer in self.reducers for r in reducer.stages())

    @property
    def merges(self) -> Merging:
        return self.reducers[-1].merges

    @property
    def reads_grid(self) -> bool:
        return any(r.reads_grid for r in self.reducers)

    def coverages(self) -> tuple[Coverage, ...]:
        return tuple(dict.fromkeys(budget for r in self.reducers for budget in r.coverages()))

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return all_needs(self)

    def check(self, model: Any, family: ModelFamily) -> None:
        for reducer in self.reducers:
            reducer.check(model, family)

    def keeps_all(self, spans: Sequence[Span]) -> bool:
        return all(r.keeps_all(spans) for r in self.reducers)

    def select(self, tokens: VisualTokens) -> Selection:
        """Decide as the methods before the LLM do, one after the other."""
        (first, *others), _ = split(self.stages())
        chosen = selected(first, tokens)
        for reducer in others:
            tokens = tokens.after(chosen)
            if budgets := reducer.coverages():
                tokens = with_coverage(tokens, budgets)  # a share of what is left
            chosen = selected(reducer, tokens)
        return chosen
