"""VFlowOpt's stages inside the LLM, which rank by the encoder's map of importance, and the method as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from foveate.author import (
    FoveateError,
    Images,
    InLlmReducer,
    Keep,
    LayerTokens,
    Method,
    Selection,
    StagedReducer,
    UnknownNameError,
    UnsupportedModelError,
    VisualTokens,
    budget,
    probes,
    ranking,
    register,
    schedules,
)
from foveate.methods.vflowopt import Judged, VFlowOpt

FIRST: Final = {"image": 1.25, "video": 1.25}
RELEASED: Final[Mapping[str, Mapping[str, Any]]] = {
    "50%": {"t": 28.683, "a": 11.757, "ratios": (0.72332, 0.748748, 0.487)},
    "25%": {"t": 34.760, "a": 15.581, "ratios": (0.265103, 0.983343, 0.877326)},
    "10%": {"t": 39.265, "a": 17.387, "ratios": (0.116615, 1.0, 0.6011)},
}
"""The strategies that the authors released for LLaVA-OneVision-7B, by the mean share of tokens that its layers get."""


@register("vflowopt_llm")
@dataclass(frozen=True)
class VFlowOptLlm(InLlmReducer):
    """VFlowOpt (arXiv 2508.05211, ICCV 2025), its stages inside the LLM alone: the least important tokens go twice.

    Importance is what `VFlowOpt` reads in the vision encoder; the LLM is not looked at.

    Parameters
    ----------
    keep
        The budget: what the layers receive on average. The counts fall by the same factor at each boundary.
    ratios
        Instead of `keep`: the share that is left at each boundary. Of n tokens ``round(n * (1 - ratio))`` go, half to
        even.
    t
        See `VFlowOpt`.
    layers
        The first layer of each further stage, counted from 0; by default those at 9/28 and 18/28 of the depth, rounded:
        the paper's 9 and 18 of 28, and 10 and 21 of 32.

    Notes
    -----
    Deviations from the paper: separators, if they are kept, count among the tokens and go last. With several images
    their tokens compete.
    """

    keep: Keep | None = None
    ratios: tuple[float, ...] | None = None
    t: float | None = None
    layers: tuple[int, ...] | None = None

    budgets = ("keep", "ratios")
    paper = "arXiv:2508.05211"
    complexity = "O(N log N) per boundary"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratios is not None:
            object.__setattr__(self, "ratios", check_ratios(self.name, self.ratios))
        if (self.keep is None) == (self.ratios is None):
            raise FoveateError(
                f"{self.name} needs either keep= or ratios=, not {'none' if self.keep is None else 'both'}"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", schedules.check_layers(self.name, self.layers))

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return (Judged(self.t), probes.Prior())

    def prior(self, tokens: VisualTokens) -> list[Tensor]:
        return tokens.probe(Judged(self.t))

    def boundaries(self, depth: int) -> Sequence[int]:
        return tuple(schedules.boundary_in(depth, b, self.name) for b in self.layers or cuts(depth))

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        given, boundaries = schedules.tokens_of(images), self.boundaries(depth)
        if self.ratios is None:
            assert self.keep is not None
            return schedules.falling(depth, boundaries, given, schedules.budget_of(self.keep, images), self.name)
        if len(self.ratios) != len(boundaries):
            raise UnsupportedModelError(
                f"{self.name} has {len(self.ratios)} ratios for boundaries {tuple(boundaries)} in an LLM of {depth} "
                "layers: give one ratio for each, or other layers"
            )
        counts = []
        for ratio in self.ratios:
            given -= round(given * (1 - ratio))
            counts.append(given)
        return counts

    def select(self, tokens: LayerTokens) -> Selection:
        return tokens.per_prompt(lambda prompts, count: ranking.top(prompts.probe(probes.Prior()), count))


@register("vflowopt_all")
@dataclass(frozen=True)
class VFlowOptAll(StagedReducer):
    """VFlowOpt (arXiv 2508.05211, ICCV 2025), all stages: one map of importance for three cuts.

    Parameters
    ----------
    keep
        The budget: what the layers of the LLM receive on average. The encoder keeps 1.25 times as many tokens, and
        the counts inside the LLM fall by the same factor at each boundary.
    ratios
        Instead of `keep`: the share that is left of an image behind the encoder and at each boundary.
    t, a, exact
        See `VFlowOpt`.
    layers
        See `VFlowOptLlm`.

    Notes
    -----
    The published method comes with ratios, `t` and `a` that a search finds for a model and a budget: `released` gives
    those of its authors, ``foveate calibrate`` (`foveate.fit.vflowopt`) finds them for other models.

    Deviations from the paper: those of `VFlowOpt` and `VFlowOptLlm`. How a plain `keep` is divided is UNVERIFIED: 1.25
    is the middle of the range that the authors search.
    """

    keep: Keep | None = None
    ratios: tuple[float, ...] | None = None
    t: float | None = None
    a: float | None = None
    exact: bool = True
    layers: tuple[int, ...] | None = None

    budgets = ("keep", "ratios")
    merges = "features"
    paper = "arXiv:2508.05211"
    complexity = "O(N log N)"

    def __post_init__(self) -> None:
        if self.keep is not None:
            super().__post_init__()
        if self.ratios is not None:
            object.__setattr__(self, "ratios", check_ratios(self.name, self.ratios))
            if len(self.ratios) < 2:
                raise FoveateError(f"{self.name} needs a ratio for the encoder and one per boundary: {self.ratios!r}")
        if (self.keep is None) == (self.ratios is None):
            raise FoveateError(
                f"{self.name} needs either keep= or ratios=, not {'none' if self.keep is None else 'both'}"
            )
        self.stages()

    @classmethod
    def released(cls, budget: str) -> VFlowOptAll:
        """Return the authors' strategy for LLaVA-OneVision-7B: ``"50%"``, ``"25%"`` or ``"10%"``.

        Raises
        ------
        UnknownNameError
            If they released none for this budget.
        """
        if budget not in RELEASED:
            raise UnknownNameError(f"strategies were released for {', '.join(RELEASED)}, not for {budget!r}")
        return cls(**RELEASED[budget])

    def stages(self) -> tuple[Method, ...]:
        if self.ratios is not None:
            before, inside = VFlowOpt(self.ratios[0], self.t, self.a, self.exact), {"ratios": self.ratios[1:]}
        else:
            assert self.keep is not None
            first, mean = schedules.staged_budgets(self.name, self.keep, FIRST)
            before, inside = VFlowOpt(first, self.t, self.a, self.exact), {"keep": mean}  # type: ignore[dict-item]
        return before, VFlowOptLlm(t=self.t, layers=self.layers, **inside)  # type: ignore[arg-type]


def cuts(depth: int) -> tuple[int, ...]:
    """Return the boundaries of VFlowOpt in an LLM of `depth` layers."""
    return schedules.after_shares(depth, (9 / 28, 18 / 28))


def check_ratios(name: str, ratios: Sequence[float]) -> tuple[float, ...]:
    """Return ratios as a tuple, or raise `FoveateError` unless all are in (0, 1]."""
    given = tuple(ratios) if isinstance(ratios, Sequence) else ()
    if not given or any(not budget.is_number(r) or not 0 < r <= 1 for r in given):
        raise FoveateError(f"the ratios of {name} are shares in (0, 1], one per stage, not {given or ratios!r}")
    return tuple(map(float, given))
