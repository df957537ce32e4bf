"""How fast it is: the selection of every method at several sizes, and the whole model with and without reduction."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from foveate.bench import arms as ways
from foveate.bench.arms import Arm
from foveate.bench.memory import MemoryMeter
from foveate.bench.model import run_arms
from foveate.check.kept import on, tokens_for
from foveate.check.subjects import Subject, together
from foveate.check.verdicts import WRONG, Minutes, Verdict, judged
from foveate.core.checks import selected
from foveate.core.reducer import Method, Reducer
from foveate.engines.settings import Settings
from foveate.measure.job import Job, Say
from foveate.measure.timing import Clock, median_p90
from foveate.measure.units import show_bytes, show_time

GRIDS: Final = ((24, 24), (48, 60), (96, 96))
SHARE: Final = 9
"""One of so many tokens stays."""
TURNS: Final = 5
BATCHES: Final = (1, 8)
_RUNS: Final = 3
_ROOM: Final = 0.8
"""Of the free memory, how much a selection may be expected to take."""


@dataclass(frozen=True)
class Cost:
    """What making the tokens of a method and selecting among them, some times, took.

    Attributes
    ----------
    tokens
        How many there were.
    seconds
        Of all of it.
    made
        Bytes at the peak of making the tokens, on the CPU.
    peak
        Bytes at the peak of the selection, on the device.
    """

    tokens: int
    seconds: float
    made: float
    peak: float

    def at(self, tokens: int, before: Cost | None) -> Cost:
        """Predict the cost for more tokens: as it grew from a smaller size, else with the square."""
        seconds, made, peak = (self._grown(tokens, name, before) for name in ("seconds", "made", "peak"))
        return Cost(tokens, seconds, made, peak)

    def _grown(self, tokens: int, name: str, before: Cost | None) -> float:
        value, power = float(getattr(self, name)), 2.0
        if before is not None and value and (earlier := float(getattr(before, name))):
            # Fixed costs hide in small sizes, so that growth gets steeper: half a power is added.
            power = min(3.0, max(1.0, math.log(value / earlier) / math.log(self.tokens / before.tokens)) + 0.5)
        return float(value * (tokens / self.tokens) ** power)


def selection(
    reducers: Sequence[Method], device: torch.device, grids: Sequence[tuple[int, int]], minutes: Minutes
) -> Verdict:
    """Time the selection of every method at sizes that ascend, what is expected to be quick first.

    It takes half of the time that is left. What would not fit into it, or into memory, as far as smaller sizes tell, is
    not run, and said so.
    """
    timed = {r.name: r for r in reducers if isinstance(r, Reducer) and r.stage == "before_llm"}
    part, costs, rows = minutes.half(), {name: list[Cost]() for name in timed}, list[dict[str, Any]]()
    ahead = {name: list(grids) for name in timed}
    while waiting := [name for name in timed if ahead[name]]:
        name = min(waiting, key=lambda name: _expected(costs[name], math.prod(ahead[name][0])).seconds)
        grid = ahead[name].pop(0)
        tokens = math.prod(grid)
        kept = max(1, tokens // SHARE)
        row = {"method": name, "tokens": tokens, "kept": kept}
        if reason := _too_much(_expected(costs[name], tokens), part.left, device):
            rows.append({**row, "verdict": "not run", "said": reason})
            continue
        own = replace(timed[name], keep=kept)
        found = judged(name, partial(_timed, own, grid, device), part)
        if found.word == "measured":
            costs[name].append(found.figures.pop("cost"))
        rows.append({**row, "verdict": found.word, "said": found.said, **found.figures})
    return _of_selections(sorted(rows, key=lambda row: (row["tokens"], row["method"])))


def _expected(found: Sequence[Cost], tokens: int) -> Cost:
    if not found:
        return Cost(tokens, 0.0, 0.0, 0.0)
    return found[-1].at(tokens, found[-2] if len(found) > 1 else None)


def _too_much(expected: Cost, left: float, device: torch.device) -> str:
    if not left or expected.seconds > left:
        return f"expected to take {show_time(expected.seconds)}, and {show_time(left)} are left for it"
    for peak, where in ((expected.made, torch.device("cpu")), (expected.peak, device)):
        if peak > _ROOM * (free := _free(where)):
            return f"expected to take {show_bytes(peak)} of memory, and {show_bytes(free)} are free"
    return ""


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def _timed(reducer: Reducer, grid: tuple[int, int], device: torch.device) -> Verdict:
    whole = Clock(device)
    with closing(MemoryMeter(torch.device("cpu"))) as making:
        tokens = tokens_for(reducer, grid)
        making.stop("vision")
        room = making.peaks()["vision"]
    tokens = on(tokens, device)
    with closing(MemoryMeter(device)) as memory:
        selected(reducer, tokens)
        memory.stop("select")
        taken = memory.peaks()["select"]
    seconds: list[float] = []
    while not seconds or (len(seconds) < _RUNS and max(seconds) < 1):
        clock = Clock(device)
        selected(reducer, tokens)
        clock.stop("select")
        seconds.append(clock.seconds["select"])
    whole.stop("select")
    figures = {**median_p90(seconds), "peak_bytes": taken}
    cost = Cost(math.prod(grid), whole.seconds["select"], room, taken)
    said = f"{show_time(statistics.median(seconds))}, {show_bytes(taken)}"
    return Verdict(reducer.name, "measured", said, {**figures, "cost": cost})


def _of_selections(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    check, figures = "selection time", {"rows": list(rows)}
    if wrong := [row for row in rows if row["verdict"] == WRONG]:
        said = "; ".join(f"{row['method']} at {row['tokens']}: {row['said']}" for row in wrong)
        return Verdict(check, WRONG, said, figures)
    parts = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        own = [row for row in rows if row["tokens"] == tokens]
        skipped = [row["method"] for row in own if row["verdict"] != "measured"]
        parts.append(f"{len(own) - len(skipped)} of {len(own)} methods at {tokens:,} tokens")
        if skipped:
            parts[-1] += f" (not run: {', '.join(skipped)})"
    ran = any(row["verdict"] == "measured" for row in rows)
    return Verdict(check, "measured" if ran else "not run", "; ".join(parts), figures)


def whole_model(
    subject: Subject, inside: bool, batch: int, pace: dict[int, float], minutes: Minutes, say: Say = lambda _: None
) -> Verdict:
    """Measure the model unpruned, with a method, and with as many tokens for free, in turns.

    Parameters
    ----------
    inside
        Whether with the method inside the LLM, rather than the one before it.
    batch
        Prompts at once, all of the first one of the subject.
    pace
        Seconds that an unpruned run takes, by prompts at once, as far as is known; what is found is added.
    """
    reducer = subject.inside() if inside else subject.before()
    check = f"speed, {reducer.name}, batch {batch}"
    job = together([subject.jobs[0]] * batch)
    found = arms_of(job, Settings.make(reducer, family=subject.family))
    if (turns := _turns(found, batch, pace, minutes)) < 1:
        return Verdict(check, "not run", f"{minutes.left:.0f} s are left, half of which two runs of each arm exceed")
    result = run_arms(found, turns, say=say)
    rows = {row["arm"]: row for row in result["arms"]}
    compared = result["comparisons"]
    figures = {"config": {**result["config"], "prompts": batch}, "arms": result["arms"], "comparisons": compared}
    ours, free = rows["method"]["kv_bytes"], rows["oracle"]["kv_bytes"]
    if ours != free:
        return Verdict(
            check, WRONG, f"a KV cache of {ours:,} bytes, where as many tokens take {free:,}: {reducer!r}", figures
        )
    first, total = compared["first_token"], compared["total"]
    said = (
        f"first token {first - 1:+.1%}, whole run {total - 1:+.1%} against unpruned; first token "
        f"{compared['first_token_of_oracle'] - 1:+.1%} against as many tokens for free"
    )
    return Verdict(check, "slower than unpruned" if first > 1 else "right", said, figures)


def arms_of(job: Job, settings: Settings) -> list[Arm]:
    """Make the arms: unpruned, with the method, and with as many tokens for free."""
    if settings.inside:
        return [ways.unpruned(job), *ways.inside(job, settings)]
    own, chosen = ways.method(job, settings)
    return [ways.unpruned(job), own, ways.oracle(job, settings, chosen)]


def _turns(arms: Sequence[Arm], batch: int, pace: dict[int, float], minutes: Minutes) -> int:
    """Return how many turns fit into half of the time that is left, behind the runs for memory, 5 at most."""

    def fitting(seconds: float) -> int:
        return min(TURNS, int(minutes.left / 2 / (len(arms) * seconds)) - 1)

    if pace and fitting(batch * max(seconds / n for n, seconds in pace.items())) < 1:
        return 0
    if batch not in pace:
        device = arms[0].job.model.device
        for _ in range(2):  # the first run of a size is longer
            meter, _ = arms[0].run(lambda: Clock(device))
        pace[batch] = sum(meter.seconds.values())
    return fitting(pace[batch])
