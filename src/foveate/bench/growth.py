"""How time and memory of each method's selection grow with the number of tokens."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from foveate.bench.inputs import WIDTH, random_tokens
from foveate.bench.loops import against_loops
from foveate.bench.memory import MemoryMeter
from foveate.bench.rounds import larger_rounds
from foveate.core.reducer import Reducer
from foveate.core.tokens import VisualTokens
from foveate.measure.pages import markdown_table
from foveate.measure.provenance import machine, versions
from foveate.measure.timing import threads
from foveate.measure.units import show_bytes

SIDES = (24, 48, 96, 128)
SHARE = 1 / 9
LIMIT = 150.0
FRAMES = 8
_NONE = "-"
_BRIEF, _MOST = 0.5, 3  # runs are repeated up to so many seconds, and so many times
Say = Callable[[str], None]


def growth(
    reducers: Sequence[Reducer],
    sides: Sequence[int] = SIDES,
    limit: float = LIMIT,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure selections of random tokens of square pictures, small to large.

    The unit of time is one float32 matrix of the cosines of as many tokens, of the width of CLIP-L, as a plain product,
    before and after each timed run in the same process. Both are processor time of one thread: so what else the
    machine does at that time hardly counts.

    Parameters
    ----------
    reducers
        Methods that act before the LLM. Each runs in a process of its own, which ends with its limit.
    sides
        Rows, and columns, of the tokens of a picture. Methods for video get them cut into frames.
    limit
        Seconds for one method at one size: making tokens, a run that measures memory, and timed ones. A method that
        takes longer has a row without figures there, and none for larger sizes.

    Returns
    -------
    dict
        Per method and size: median seconds, the median of their ratios to the unit, and the peak of the memory of
        tensors in bytes, over that of the inputs.
    """
    rows = []
    for reducer in reducers:
        for row in _in_a_process(reducer, sides, limit):
            say(f"{row['method']}, {row['tokens']} tokens")
            rows.append(row)
    with threads(1):
        about = machine()
    say("plain loops, and rounds of VisPruner")
    with threads(1):
        beside = {"plain_loops": against_loops()["rows"], "vispruner_rounds": larger_rounds()}
    config = {"width_of_unit": WIDTH, "limit_s": limit, "frames": FRAMES, "dtype": "float32", "clock": "cpu"}
    return {"config": config, "machine": about, "versions": versions(), "rows": rows, **beside}


def _in_a_process(reducer: Reducer, sides: Sequence[int], limit: float) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of torch
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_all, args=(sender, reducer, sides), daemon=True)
    process.start()
    sender.close()
    try:
        for side in sides:
            row = {"method": reducer.name, "reducer": repr(reducer), "tokens": side * side}
            try:
                found = receiver.recv() if receiver.poll(limit) else {"stopped": f"after {limit:g} s"}
            except EOFError:
                process.join()
                found = {"stopped": f"exit code {process.exitcode}"}
            yield row | found
            if "stopped" in found:
                return
    finally:
        process.kill()
        process.join()


def _measure_all(sender: Connection, reducer: Reducer, sides: Sequence[int]) -> None:
    torch.set_num_threads(1)
    for side in sides:
        sender.send(measure(reducer, side))


@torch.no_grad()
def measure(reducer: Reducer, side: int) -> dict[str, Any]:
    """Measure one method on a picture of ``side * side`` tokens."""
    tokens = _tokens(reducer, side)
    features = torch.randn(side * side, WIDTH, generator=torch.Generator().manual_seed(0))
    peak, kept = _peak(reducer, tokens)
    seconds: list[float] = []
    units: list[float] = []
    before = _time(lambda: _unit(features))
    while not seconds or (len(seconds) < _MOST and sum(seconds) < _BRIEF):
        seconds.append(_time(lambda: reducer.select(tokens)))
        after = _time(lambda: _unit(features))
        units.append(2 * seconds[-1] / (before + after))
        before = after
    return {
        "kept": kept,
        "seconds": round(statistics.median(seconds), 6),
        "units": round(statistics.median(units), 3),
        "peak_bytes": peak,
        "runs": len(seconds),
    }


@torch.no_grad()
def measure_memory(reducer: Reducer, side: int) -> tuple[int, int]:
    """Return the peak of the memory of tensors in bytes, over that of the inputs, and how many tokens are kept."""
    return _peak(reducer, _tokens(reducer, side))


def _unit(features: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(features, dim=-1)
    return unit @ unit.T


def _tokens(reducer: Reducer, side: int) -> VisualTokens:
    if reducer.video_only:
        return random_tokens(reducer.needs, (side // FRAMES, side), frames=FRAMES)
    return random_tokens(reducer.needs, (side, side))


def _peak(reducer: Reducer, tokens: VisualTokens) -> tuple[int, int]:
    """Return the peak of memory, and how many tokens are kept."""
    meter = MemoryMeter(torch.device("cpu"))
    try:
        (span,) = reducer.select(tokens)
        meter.stop("select")
        return meter.peaks()["select"], len(span)
    finally:
        meter.close()


def _time(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def growth_table(result: Mapping[str, Any], memory_at: int = 9216) -> str:
    """Return units by size, the exponent of the growth in N of the last doubling, and memory as Markdown."""
    sizes = sorted({row["tokens"] for row in result["rows"]})
    names = dict.fromkeys(row["method"] for row in result["rows"])
    lines = []
    for name in names:
        own = {row["tokens"]: row for row in result["rows"] if row["method"] == name}
        done = [own[size] for size in sizes if "seconds" in own.get(size, {})]
        peak = own.get(memory_at, {}).get("peak_bytes")
        memory = show_bytes(peak) if peak else _NONE
        lines.append([f"`{name}`", *(_shown(own.get(size)) for size in sizes), _exponent(done), memory])
    return markdown_table(["method", *(f"{size:,}" for size in sizes), "grows as", f"memory at {memory_at:,}"], lines)


def _shown(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return _NONE
    return row.get("stopped") or f"{row['units']:.2f}"


def _exponent(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return by which power of N the seconds grew over the last step, if they are long enough to tell."""
    if len(rows) < 2 or rows[-1]["seconds"] < 0.01:
        return _NONE
    low, high = rows[-2:]
    power = math.log(high["seconds"] / low["seconds"]) / math.log(high["tokens"] / low["tokens"])
    return f"N^{power:.1f}"
