"""Several methods at several budgets on one question: what each keeps, answers and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from foveate.core.errors import InputError
from foveate.core.probes import LayerAttention
from foveate.core.reducer import Method
from foveate.measure.job import Job
from foveate.measure.loading import encoder_view
from foveate.measure.run import Outcome, run_methods
from foveate.viz.fate import fate, first_kept
from foveate.viz.panels import Panel, edges, panels

_LONG_SIDE = 480


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods at budgets, measured in turn.

    Attributes
    ----------
    question, model
        What was asked, and of which model.
    job
        The question as the model got it.
    panels
        Pictures with the places of the tokens.
    budgets
        As they were asked for, from few tokens to many.
    unpruned
        The stock model.
    arms
        For each method what came out at each budget.
    """

    question: str
    model: str
    job: Job
    panels: tuple[Panel, ...]
    budgets: tuple[str, ...]
    unpruned: Outcome
    arms: Mapping[str, tuple[Outcome, ...]]

    def order(self, method: str) -> list[np.ndarray]:
        """Return for each span the first budget at which a method keeps each token, ``[N]``, -1 where none does."""
        rows = [arm.selection for arm in self.arms[method]]
        return [first_kept([row[i] for row in rows]) for i in range(len(self.job.spans))]

    def left_again(self, method: str, budget: int) -> int:
        """Return how many tokens a method keeps at a smaller budget, but not at this one."""
        before = [(first >= 0) & (first < budget) for first in self.order(method)]
        places = [fate(chosen).places for chosen in self.arms[method][budget].selection]
        return sum(int((b & ~p).sum()) for b, p in zip(before, places, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as JSON-compatible data."""
        return {
            "question": self.question,
            "model": self.model,
            "tokens": {"visual": self.job.visual_tokens, "text": self.job.text_tokens},
            "budgets": list(self.budgets),
            "unpruned": self.unpruned.to_dict(),
            "methods": [self._method(name) for name in self.arms],
        }

    def _method(self, name: str) -> dict[str, Any]:
        arms = [self._arm(name, i) for i in range(len(self.budgets))]
        return {"name": name, "order": [first.tolist() for first in self.order(name)], "arms": arms}

    def _arm(self, name: str, budget: int) -> dict[str, Any]:
        arm = self.arms[name][budget]
        fates = [fate(chosen) for chosen in arm.selection]
        counts = [shown.counts() for shown in fates]
        return {
            **arm.to_dict(),
            "budget": self.budgets[budget],
            "same_answer": arm.answer == self.unpruned.answer,
            "counts": {key: sum(count[key] for count in counts) for key in counts[0]},
            "left_again": self.left_again(name, budget),
            "kept": [chosen.kept.tolist() for chosen in arm.selection],
            "into": [shown.into.tolist() for shown in fates],
            "shared": [shown.shared().tolist() for shown in fates],
            "saliency": self._saliency(arm),
            "reads": reads(arm),
        }

    def _saliency(self, arm: Outcome) -> list[list[float | None]] | None:
        """Lay the attention that an arm read out over the tokens of each span; separators have none."""
        if arm.saliency is None:
            return None
        rows, first = [], 0
        for span in self.job.spans:
            row: list[float | None] = [None] * len(span)
            for crop in span.crops:
                for position, value in zip(crop.index.tolist(), arm.saliency[first].tolist(), strict=True):
                    row[position] = float(f"{value:.4g}")
                first += 1
            rows.append(row)
        return rows


def reads(arm: Outcome) -> str:
    """Say which attention the method of an arm reads; of the vision encoder's there is a picture, its saliency."""
    if arm.saliency is not None:
        return "attention of the vision encoder"
    stages = () if arm.reducer is None else arm.reducer.stages()
    inside = any(isinstance(probe, LayerAttention) for stage in stages for probe in stage.needs)
    return "attention inside the LLM" if inside else "no attention"


def compare(
    job: Job,
    image: Image.Image,
    question: str,
    model: str,
    methods: Mapping[str, Sequence[Method]],
    budgets: Sequence[str],
    repeats: int = 3,
    say: Callable[[str], None] = lambda _: None,
    rectify: float = 0.0,
    absorb: bool = False,
) -> Comparison:
    """Measure methods at budgets, and the unpruned model beside them.

    Parameters
    ----------
    job, image, question
        From `foveate.measure.job.prepare`, and what it was made of.
    model
        Name of the model, for headings.
    methods
        By name, one reducer per budget.
    budgets
        What each reducer of a method was asked for, as text.
    repeats
        Measured runs of each, of which the median counts.
    say
        Gets a line about what is going on.
    rectify, absorb
        See `foveate.engines.settings.Settings`.

    Raises
    ------
    InputError
        If it is not known where in the image the tokens lie.
    """
    shown = panels([[encoder_view(job.processor, image)]] * len(job.spans), job.spans, _LONG_SIDE)
    for panel in shown:
        for crop in panel.crops:
            edges(crop, 1, 1)  # raises
    names = list(methods)
    unpruned, *measured = run_methods(
        job, [None, *(r for name in names for r in methods[name])], repeats=repeats, say=say, rectify=rectify,
        absorb=absorb,
    )  # fmt: skip
    rows = [measured[i : i + len(budgets)] for i in range(0, len(measured), len(budgets))]
    order = sorted(range(len(budgets)), key=lambda i: (sum(row[i].kept for row in rows), i))
    return Comparison(
        question, model, job, tuple(shown), tuple(budgets[i] for i in order), unpruned,
        {name: tuple(row[i] for i in order) for name, row in zip(names, rows, strict=True)},
    )  # fmt: skip


def reducers(methods: Sequence[str], budgets: Sequence[str], make: Callable[[str, str], Method]) -> dict[str, Any]:
    """Return for each method one reducer per budget, checking that nothing is asked for twice.

    Parameters
    ----------
    make
        Builds a reducer from a method's name or file and a budget.
    """
    for what, asked in (("method", methods), ("budget", budgets)):
        if not asked:
            raise InputError(f"there is no {what} to compare: give at least one")
        if twice := sorted({name for name in asked if list(asked).count(name) > 1}):
            raise InputError(f"the {what} {twice[0]!r} is asked for twice: once is enough")
    return {name: [make(name, keep) for keep in budgets] for name in methods}


__all__ = ["Comparison", "compare", "reads", "reducers"]
