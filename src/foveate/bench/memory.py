"""Peak memory of a run, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from foveate.engines.pipeline import Meter
from foveate.measure.timing import STAGES

_MARK = "foveate/"


class MemoryMeter(Meter):
    """Measures the most bytes of tensors that each stage holds, over what was there at the start.

    On a GPU the caching allocator of torch keeps the count. On a CPU the profiler of torch reports each allocation of
    a tensor and its release; scratch space that a kernel takes for itself is not among them.
    """

    def __init__(self, device: torch.device):
        self._device, self._peaks = device, dict.fromkeys(STAGES, 0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        self._running = device.type != "cuda"

    def stop(self, stage: str) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - self._before
            self._peaks[stage] = max(self._peaks[stage], peak)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with record_function(_MARK + stage):
                pass

    def close(self) -> None:
        """End the measurement: a profiler that is left running takes the interpreter down with it."""
        if self._running:
            self._running = False
            self._profile.stop()

    def peaks(self) -> dict[str, int]:
        """End the measurement, and return bytes by stage and their maximum as ``"total"``."""
        if self._running:
            self.close()
            # The public views of the profiler order events by operator; a peak needs them as they happened.
            self._peaks = _peaks(self._profile.profiler.kineto_results.events())  # type: ignore[union-attr]
        return {**self._peaks, "total": max(self._peaks.values())}


def _peaks(events: Iterable[Any]) -> dict[str, int]:
    peaks, held, most = dict.fromkeys(STAGES, 0), 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        name = event.name()
        if name == "[memory]":
            held += event.nbytes()
            most = max(most, held)
        elif name.startswith(_MARK):
            stage = name.removeprefix(_MARK)
            peaks[stage], most = max(peaks[stage], most), held
    return peaks
