"""Successive halving: many candidates on few prompts, then ever fewer on ever more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, Literal, TypeAlias

from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.reducer import Method
from foveate.tune.asking import Asker
from foveate.tune.bounds import Estimate, disagreement, drop, middle
from foveate.tune.candidates import CONTROLS
from foveate.tune.journal import Journal
from foveate.tune.prompts import Prompt

By: TypeAlias = Literal["time", "flops"]

PROMPTS: Final = 8
"""Fewer prompts tell nothing."""
COUNTED: Final = 4
"""FLOPs are counted on so many prompts: they depend on sizes alone."""
FINALISTS: Final = 6
"""Halving leaves at least so many candidates."""


@dataclass(frozen=True)
class Wish:
    """What is asked for: a loss of at most `max_loss` as cheaply, or a speed-up of at least `speedup` as loyally.

    Attributes
    ----------
    by
        What cheap means: measured time, or counted FLOPs of the prefill, each relative to the unpruned model.
    confidence
        Of every bound, one-sided.
    """

    max_loss: float | None = None
    speedup: float | None = None
    by: By = "time"
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if (self.max_loss is None) == (self.speedup is None):
            raise InputError("wish for one thing: a --max-loss such as 0.01, or a --speedup such as 2")
        if self.max_loss is not None and not 0.0 < self.max_loss < 1.0:
            raise InputError(f"a loss is a share between 0 and 1, such as 0.01, not {self.max_loss:g}")
        if self.speedup is not None and not 1.0 < self.speedup < math.inf:
            raise InputError(f"a speed-up is a factor above 1, such as 2, not {self.speedup:g}")
        if not 0.5 < self.confidence <= 0.99:
            raise InputError(f"a confidence is above 0.5 and at most 0.99, not {self.confidence:g}")

    @property
    def text(self) -> str:
        """The wish in words."""
        if self.speedup is not None:
            return f"{'time' if self.by == 'time' else 'FLOPs'} cut to at most 1/{self.speedup:g}"
        return f"a loss of at most {self.max_loss:.2%}"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `InputError` if so few prompts could not show that the wish is fulfilled, whatever the answers are."""
        if len(prompts) < PROMPTS:
            raise InputError(f"{len(prompts)} prompts tell nothing: give at least {PROMPTS}, better some hundreds")
        if self.max_loss is None:
            return
        labelled = prompts[0].answer is not None
        least = self._perfect(len(prompts), labelled)
        if least > self.max_loss:
            needed = len(prompts)
            while self._perfect(needed, labelled) > self.max_loss:
                needed += max(1, needed // 50)
            raise InputError(
                f"{len(prompts)} prompts cannot show a loss of at most {self.max_loss:.2%} with {self.confidence:.0%} "
                f"confidence, not even if no answer changes: give about {needed} prompts, or allow {least:.3f}"
            )

    def _perfect(self, n: int, labelled: bool) -> float:
        """Return the upper bound of the loss if none of `n` answers changes."""
        bounds = drop([0] * n, range(n), self.confidence) if labelled else None
        return (bounds or disagreement([False] * n, range(n), self.confidence)).high


@dataclass(frozen=True)
class Standing:
    """What is known of a candidate after so many prompts.

    Attributes
    ----------
    loss
        Share of answers that differ from the unpruned model's or, with right answers known, drop of accuracy.
    kl
        Mean KL divergence of the first token's distribution from the unpruned model's, nats.
    agreement, accuracy
        Shares of prompts; accuracy is `None` without right answers.
    time
        Relative to the unpruned model, median.
    flops
        Of the prefill, relative to the unpruned model, mean over the first prompts; `None` if unknown.
    tokens
        Share of visual tokens that the layers of the LLM receive, mean over layers and prompts.
    """

    prompts: int
    loss: Estimate
    kl: float
    agreement: float
    accuracy: float | None
    time: Estimate
    flops: float | None
    tokens: float

    def cost(self, by: By) -> Estimate:
        """Return what the candidate costs, relative to the unpruned model; FLOPs are exact."""
        if by == "time":
            return self.time
        assert self.flops is not None
        return Estimate(self.flops, self.flops, self.flops)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-compatible data."""
        return {
            "prompts": self.prompts, "loss": self.loss.to_dict(),
            "kl": round(self.kl, 6) if math.isfinite(self.kl) else None, "agreement": round(self.agreement, 6),
            "accuracy": None if self.accuracy is None else round(self.accuracy, 6), "time": self.time.to_dict(),
            "flops": None if self.flops is None else round(self.flops, 6), "tokens": round(self.tokens, 6),
        }  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes
    ----------
    rungs
        Prompts asked so far at the end of each rung.
    rows
        What `Asker.ask` returned, prompt by prompt.
    standings
        Per candidate one standing for each rung that it took part in; without those that failed. The controls have
        one more, on all prompts.
    controls
        The controls that the best candidate is held against.
    failed
        Candidates that could not run on a prompt, with the reason.
    winner, closest
        The candidate that fulfils the wish best; without one, the one that comes closest.
    """

    rungs: tuple[int, ...]
    rows: tuple[dict[str, Any], ...]
    standings: dict[str, list[Standing]]
    controls: tuple[str, ...]
    failed: dict[str, str]
    winner: str | None
    closest: str | None


def search(
    asker: Asker,
    prompts: Sequence[Prompt],
    candidates: Mapping[str, Method],
    wish: Wish,
    journal: Journal,
    *,
    start: int = 16,
    on_rung: Callable[[str, int], None] = lambda _, __: None,
    on_runs: Callable[[int], None] = lambda _: None,
) -> Found:
    """Find the candidate that fulfils a wish best.

    Every rung doubles the prompts, and each candidate is asked the new ones only. Between two rungs, `survivors` go on.
    In the end the `controls_of` the best candidate are asked what they were not asked before, so that all of them can
    be held against it.

    Parameters
    ----------
    prompts
        In the order in which they are asked; see `foveate.tune.prompts.ordered`.
    start
        Prompts of the first rung.
    on_rung, on_runs
        Called as a rung begins, with words and its number of runs, and after some runs, with their number.

    Raises
    ------
    UnsupportedModelError
        If FLOPs are to decide and are not known.
    """
    rungs = rung_sizes(start, len(prompts))
    standings: dict[str, list[Standing]] = {name: [] for name in candidates}
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    alive, asked = list(candidates), 0

    def ask(prompt: Prompt, names: Sequence[str], count: bool) -> dict[str, Any]:
        nonlocal asked
        running = {name: candidates[name] for name in names}
        row = journal.read(asked, prompt, names)
        if row is None:
            row = asker.ask(prompt, running, count=count)
            journal.write(row)
        asked += 1
        on_runs(len(names))
        failed.update({name: arm["error"] for name, arm in row["arms"].items() if "error" in arm})
        return row

    for number, size in enumerate(rungs, start=1):
        on_rung(f"rung {number} of {len(rungs)}, candidates: {len(alive)}", (size - len(rows)) * len(alive))
        for prompt in prompts[len(rows) : size]:
            if not alive:
                break
            rows.append(ask(prompt, alive, count=len(rows) < COUNTED))
            alive = [name for name in alive if name not in failed]
            if wish.by == "flops" and any(rows[0]["arms"][name]["flops"] is None for name in alive):
                raise UnsupportedModelError("the FLOPs of this model are not known: go by time")
        current = {name: standing(name, rows, prompts, wish.confidence) for name in alive}
        for name, now in current.items():
            standings[name].append(now)
        going_on = survivors(current, wish)
        if not going_on or size == len(prompts):
            break
        alive = going_on
    winner = choose(current, wish) if size == len(prompts) else None
    last = {name: s[-1] for name, s in standings.items() if s and name not in failed}
    closest = None if winner else nearest(last, wish)
    controls = controls_of(last, winner or closest)
    lacking = [[name for name in controls if name not in row["arms"]] for row in rows]
    on_rung("controls", sum(map(len, lacking)))
    for prompt, row, names in zip(prompts, rows, lacking, strict=False):
        if names := [name for name in names if name not in failed]:
            row["arms"].update(ask(prompt, names, count=False)["arms"])
    for name in controls:
        if name not in failed:
            standings[name].append(standing(name, rows, prompts, wish.confidence))
    ranked = {name: standings[name] for name in candidates if name not in failed}
    return Found(tuple(rungs[:number]), tuple(rows), ranked, tuple(controls), failed, winner, closest)


def controls_of(last: Mapping[str, Standing], best: str | None) -> list[str]:
    """Return of each control, unless it is the best itself, the candidate with the nearest share of tokens."""
    if best is None:
        return []
    found = []
    for control in CONTROLS:
        own = [name for name in last if name.split()[0] == control != best.split()[0]]
        found += sorted(own, key=lambda name: abs(last[name].tokens - last[best].tokens))[:1]
    return found


def rung_sizes(start: int, total: int) -> list[int]:
    """Return the prompts asked at the end of each rung: doubling, and all of them in the last."""
    sizes = [min(start, total)]
    while sizes[-1] < total:
        sizes.append(min(2 * sizes[-1], total))
    return sizes


def standing(name: str, rows: Sequence[Mapping[str, Any]], order: Sequence[Prompt], confidence: float) -> Standing:
    """Sum up what a candidate did on the prompts so far, which are the first ones of an order."""
    arms = [row["arms"][name] for row in rows]
    images = [prompt.images for prompt in order[: len(rows)]]
    counted = [arm["flops"] for arm in arms if arm["flops"] is not None]
    if order[0].answer is None:
        loss, accuracy = disagreement([not arm["same"] for arm in arms], images, confidence), None
    else:
        loss = drop([row["right"] - arm["right"] for row, arm in zip(rows, arms, strict=True)], images, confidence)
        accuracy = fmean(arm["right"] for arm in arms)
    kl = fmean(math.inf if arm["kl"] is None else arm["kl"] for arm in arms)
    return Standing(
        len(arms), loss, kl, fmean(arm["same"] for arm in arms), accuracy,
        middle([arm["time"] for arm in arms], confidence), fmean(counted) if counted else None,
        fmean(arm["tokens"] for arm in arms),
    )  # fmt: skip


def survivors(current: Mapping[str, Standing], wish: Wish) -> list[str]:
    """Return which candidates go on to the next rung, in their order.

    Those go out whose bound says that they miss the wish. If more than half are left, half go on (but at least
    `FINALISTS`). Towards a speed-up, these are the ones of the lowest lower bound of loss, then of the lowest
    divergence. Towards a small loss, they are taken layer by layer of the Pareto front of cost, loss and divergence,
    which tells candidates apart before enough answers have changed; of a layer that does not fit, first the one of the
    lowest divergence, as a way back, then the cheapest whose loss so far is as small as wished for.
    """
    possible = [name for name, s in current.items() if may_fulfil(s, wish)]
    room = max(FINALISTS, math.ceil(len(current) / 2))
    if len(possible) <= room:
        return possible
    if wish.max_loss is None:
        chosen = sorted(possible, key=lambda name: (current[name].loss.low, current[name].kl))[:room]
    else:
        most, by = wish.max_loss, wish.by

        def urgency(name: str) -> tuple[bool, float, float]:
            s = current[name]
            return s.loss.value > most, s.loss.low if s.loss.value > most else 0.0, s.cost(by).value

        chosen, rest = [], possible
        while len(chosen) < room:
            layer = pareto({n: (current[n].cost(by).value, current[n].loss.value, current[n].kl) for n in rest})
            most_loyal = min(layer, key=lambda name: current[name].kl)
            layer.sort(key=lambda name: (name != most_loyal, *urgency(name)))
            chosen += layer[: room - len(chosen)]
            rest = [name for name in rest if name not in layer]
    return [name for name in possible if name in set(chosen)]


def may_fulfil(standing: Standing, wish: Wish) -> bool:
    """Return whether a candidate may turn out to fulfil the wish, with the wish's confidence."""
    if wish.speedup is not None:
        return standing.cost(wish.by).low <= 1 / wish.speedup
    assert wish.max_loss is not None
    return standing.loss.low <= wish.max_loss


def choose(current: Mapping[str, Standing], wish: Wish) -> str | None:
    """Return the candidate that fulfils the wish, with its confidence, and is the best of these otherwise."""
    if wish.speedup is not None:
        fit = {n: s for n, s in current.items() if s.cost(wish.by).high <= 1 / wish.speedup}
        return min(fit, key=lambda n: (fit[n].loss.value, fit[n].kl), default=None)
    assert wish.max_loss is not None
    fit = {n: s for n, s in current.items() if s.loss.high <= wish.max_loss}
    return min(fit, key=lambda n: (fit[n].cost(wish.by).value, fit[n].kl), default=None)


def nearest(last: Mapping[str, Standing], wish: Wish) -> str | None:
    """Return the candidate whose bound comes closest to the wish."""
    if wish.speedup is not None:
        return min(last, key=lambda n: (last[n].cost(wish.by).high, last[n].kl), default=None)
    return min(last, key=lambda n: (last[n].loss.high, last[n].kl), default=None)


def pareto(points: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the points that no other equals or betters in all figures, ascending in the first."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: tuple(points[name])):
        # What comes before is no larger in the first figure that differs, so only earlier points can be better.
        if not any(all(a <= b for a, b in zip(points[one], points[name], strict=True)) for one in front):
            front.append(name)
    return front
