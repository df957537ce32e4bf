"""Timing: a clock that knows the stages of a run, and the figures that are told of many runs."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from foveate.core.errors import InputError
from foveate.engines.pipeline import Meter

STAGES = ("vision", "select", "prefill", "decode")


def check_clock(name: str, device: torch.device) -> None:
    """Raise `InputError` if a clock called ``"cpu"`` would not show how long a run takes."""
    if name == "cpu" and (torch.get_num_threads() > 1 or device.type != "cpu"):
        raise InputError("processor time is the time of a run only with one thread and without a GPU: use 1 thread")


class Clock(Meter):
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
        self.start()

    def start(self) -> None:
        """Begin the first stage: what came before is not measured."""
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


@contextmanager
def encoder_reports(model: Any, meter: Meter) -> Iterator[None]:
    """Let the model's own vision encoder report its end; what comes before it in a forward pass is prefill."""
    owner = model.model if hasattr(model.model, "get_image_features") else model
    names = [name for name in ("get_image_features", "get_video_features") if hasattr(owner, name)]
    for name in names:
        setattr(owner, name, _reporting(getattr(owner, name), meter))
    try:
        yield
    finally:
        for name in names:
            delattr(owner, name)


def _reporting(encode: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    @functools.wraps(encode)  # transformers reads its signature
    def reporting(*args: Any, **kwargs: Any) -> Any:
        meter.stop("prefill")
        out = encode(*args, **kwargs)
        meter.stop("vision")
        return out

    return reporting


def median_p90(seconds: Sequence[float]) -> dict[str, float]:
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
