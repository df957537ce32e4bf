"""Attention of vision towers that nobody has described, as values of the tokens that patches end in."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from foveate.core.ambient import neutral
from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Heads, LayerProbe, Probe
from foveate.families.survey import Lead, Survey, Tower, Unreadable, sequences, surveyed
from foveate.families.taps import Taps, implementation_of, twin

_KNOWN = 64
"""How many layouts of inputs are remembered per model."""

_surveys: WeakKeyDictionary[nn.Module, dict[str, Survey]] = WeakKeyDictionary()
_lock = threading.Lock()


def look(
    model: Any,
    stacks: Sequence[Tower],
    inputs: Mapping[str, Any],
    probes: Sequence[LayerProbe],
    run: Callable[[Mapping[str, Any]], Any],
    rows_of: Callable[[Any], Tensor],
) -> tuple[Any, dict[Probe, Tensor]]:
    """Run a model's own encoder and projector, and read its attention layers on the way.

    Parameters
    ----------
    stacks
        What `towers` found in the model.
    inputs
        What the encoder takes.
    run
        Runs it on inputs.
    rows_of
        Returns the tokens of all images in what `run` returned, ``[M, D]``.

    Returns
    -------
    tuple
        What `run` returned, and the values of the probes, each ``[M, ...]``.

    Raises
    ------
    UnsupportedModelError
        If the tokens are not made of patches of their own, or the attention is none that can be read.
    """
    with _lock:
        known = _surveys.setdefault(model, {})
    key = _layout(inputs, stacks)
    try:
        if (survey := known.get(key)) is None:
            survey = surveyed(stacks, inputs, run, rows_of)
            with _lock:
                known[key] = survey
                for old in list(known)[:-_KNOWN]:
                    del known[old]
        return _read(stacks[survey.tower], survey, inputs, probes, run)
    except Unreadable as reason:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention that tells its tokens apart: {reason}; use a method that needs "
            "only tokens, such as 'divprune', 'dart' or 'random'"
        ) from reason


def _layout(inputs: Mapping[str, Any], stacks: Sequence[Tower]) -> str:
    """Sum up what the way from patches to tokens may hang on: all of the inputs but the values of pixels."""
    digest = hashlib.sha256(repr([implementation_of(tower.root.config) for tower in stacks]).encode())
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            digest.update(repr((name, tuple(value.shape), value.dtype)).encode())
            if not value.is_floating_point():
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr((name, value)).encode())
    return digest.hexdigest()


def _read(
    tower: Tower,
    survey: Survey,
    inputs: Mapping[str, Any],
    probes: Sequence[LayerProbe],
    run: Callable[[Mapping[str, Any]], Any],
) -> tuple[Any, dict[Probe, Tensor]]:
    depth, whole = len(tower.layers), tower.whole_layers()
    numbers = {probe: probe.numbers(depth, survey.read, whole) for probe in probes}
    watched: dict[nn.Module, list[LayerProbe]] = {}
    for probe, layers in numbers.items():
        shares = isinstance(probe.layers, float) or any(isinstance(i, float) for i in probe.layers)
        if whole is None and survey.windows and shares:
            raise Unreadable("some of its layers attend within windows, and the configuration does not say which")
        for i in layers:
            if not survey.first <= i <= survey.read:
                raise Unreadable(f"layer {i} of its vision encoder has other positions than layer {survey.read}")
            watched.setdefault(tower.attention[i], []).append(probe)
    taps = _Pictures(watched, survey.lead)
    with twin(tower.root, taps):
        output = run(inputs)
    values: dict[Probe, Tensor] = {}
    for probe, layers in numbers.items():
        if any(p is probe for p in taps.missing()):
            raise Unreadable(f"its attention was not seen in this pass, so {probe} cannot be read")
        found = [torch.cat([x.flatten(0, 1) for x in taps.values(tower.attention[i], probe)]) for i in layers]
        if any(len(x) != survey.positions for x in found):
            raise Unreadable("its vision encoder sees other numbers of patches from pass to pass")
        values[probe] = survey.to_tokens(torch.stack(found, dim=-1) if probe.stacked else found[0])
    return output, values


class _Pictures(Taps):
    """Taps that tell pictures apart by what a call itself says: its bounds, or a mask of blocks."""

    def __init__(self, probes: dict[nn.Module, list[LayerProbe]], lead: Lead = "none"):
        super().__init__(probes, int(lead != "none"))
        self._last = lead == "last"

    def read(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        bounds: Tensor | None,
        mask: Any = None,
        out: Tensor | None = None,
    ) -> None:
        for probe in self.probes.get(module, ()):
            with torch.no_grad(), neutral():
                for q, k, v, seen in sequences(query.detach(), key.detach(), value.detach(), bounds, mask):
                    if self._last:
                        q, k, v = (x.roll(1, dims=2) for x in (q, k, v))
                        seen = None if seen is None else seen.roll(1, dims=-1)
                        seen = seen if seen is None or seen.shape[2] == 1 else seen.roll(1, dims=2)
                    values = probe.read(Heads(q, k, v, scaling, self.lead, seen))
                    self._parts.setdefault((module, probe), []).append(values)
