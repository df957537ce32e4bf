"""Timing: a clock that knows the stages of a run, and the figures that are told of many runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from foveate.core.errors import InputError

STAGES = ("vision", "select", "prefill", "decode")


class Meter(Protocol):
    """What a run reports the ends of its stages to."""

    def stop(self, stage: str) -> None:
        """End a stage, which began where the one before it ended. A stage may come in several pieces."""


def check_clock(name: str, device: torch.device) -> None:
    """Raise `InputError` if a clock called ``"cpu"`` would not show how long a run takes."""
    if name == "cpu" and (torch.get_num_threads() > 1 or device.type != "cpu"):
        raise InputError("processor time is the time of a run only with one thread and without a GPU: use 1 thread")


class Clock:
    """Adds up the seconds of stages, waiting for the device at each stop.

    Parameters
    ----------
    device
        Where the model is.
    now
        Where the time comes from. `time.process_time` counts what the processor spends on this process alone: with one
        thread that is the time on an idle machine, whatever else this one does.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self._device, self._time, self.seconds = device, now, dict.fromkeys(STAGES, 0.0)
        self._last = self._now()

    def stop(self, stage: str) -> None:
        now = self._now()
        self.seconds[stage] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._time()


class FirstToken(BaseStreamer):  # type: ignore[misc]
    """A streamer that ends the prefill when the first token of the answer arrives, and decoding at its end."""

    def __init__(self, meter: Meter):
        self._meter, self._calls = meter, 0

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call brings the prompt
            self._meter.stop("prefill")

    def end(self) -> None:
        self._meter.stop("decode")


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 90th percentile of runs, in milliseconds."""
    ordered = sorted(seconds)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return {"median_ms": round(1e3 * statistics.median(ordered), 3), "p90_ms": round(1e3 * p90, 3)}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads; `None` leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
